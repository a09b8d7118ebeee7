import torch, warnings; warnings.simplefilter("ignore")
from torch import nn
from resist_lightning.ist.layout import NeuronLayout
from resist_lightning.auxnet.layout import StageLayout
from resist_lightning.block_layout import BlockLayout
from resist_lightning.config import *
class Sc(nn.Module):
    def __init__(s): super().__init__(); s.a=nn.Linear(8,8); s.b=nn.Linear(8,8)
    def forward(s,x): return x + s.b(torch.relu(s.a(x)))
class Net(nn.Module):
    def __init__(s, f): super().__init__(); s.stem=nn.Linear(8,8); s.body=nn.Sequential(*[f(Sc()) for _ in range(3)]); s.head=nn.Linear(8,4)
    def forward(s,x): return s.head(s.body(s.stem(x)))
def scripted_inside(m): m.a = torch.jit.script(m.a); return m
def rnn(m):
    class R(nn.Module):
        def __init__(s): super().__init__(); s.g=nn.LSTM(8,8,batch_first=True)
        def forward(s,x): return x+s.g(x)[0]
    return R()
def wn(m): m.a=nn.utils.weight_norm(m.a); m.b = nn.utils.weight_norm(m.b); return m
def sn(m): m.a=nn.utils.spectral_norm(m.a); return m
def pr(m): nn.utils.prune.l1_unstructured(m.a,"weight",.5); return m
ex = torch.randn(4,3,8)
for name,f in dict(script=torch.jit.script, trace=lambda m: torch.jit.trace(m, torch.ones(2,8)), inside=scripted_inside, rnn=rnn, weight_norm=wn, spectral=sn, prune=pr).items():
    for lay in (lambda n: BlockLayout(n, Config(blocks="body.*", min_blocks=1), 2), lambda n: NeuronLayout(n, NeuronConfig(), 2), lambda n: StageLayout(n, StageConfig(), 2)):
        try:
            l=lay(Net(f)); print(name, "OK", l.describe()[:150].replace("\n"," ") if not isinstance(l, StageLayout) else [l.chain.units])
        except Exception as e: print(name, type(e).__name__, str(e)[:220])
