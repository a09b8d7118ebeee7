import torch, gc
from torch import nn
from resist_lightning.blocks import recognise, select_blocks, Block
from resist_lightning.presence import Presence, Residency
from torch.nn.utils import weight_norm, spectral_norm, prune
class Rnn(nn.Module):
    def __init__(s, kind=nn.LSTM): super().__init__(); s.g = kind(8,8,batch_first=True); s.out=nn.Linear(8,8)
    def forward(s,x): return x + s.out(s.g(x)[0])
for kind in (nn.LSTM, nn.GRU, nn.RNN):
    b = Rnn(kind); x = torch.randn(2,3,8); y0 = b(x).detach(); v={k:t.clone() for k,t in b.state_dict().items()}
    pr = Presence(Block("b", b, None, True))
    for _ in range(3):
        b(x).sum().backward(); pr.free(); print(repr(b.g.weight_ih_l0))
        for read in (lambda: b.g(x), lambda: b.g.flatten_parameters(), lambda: __import__("copy").deepcopy(b), lambda: b.state_dict()):
            try: print(read())
            except Exception as e: print(type(e).__name__, str(e)[:150])
        pr.allocate(); b.load_state_dict(v)
        assert torch.equal(b(x), y0)
for wrap in (lambda l: weight_norm(l), lambda l: spectral_norm(l), lambda l: prune.l1_unstructured(l,"weight",.5), lambda l: nn.utils.parametrizations.weight_norm(l), lambda l: nn.utils.parametrizations.spectral_norm(l)):
    class W(nn.Module):
        def __init__(s): super().__init__(); s.lin = wrap(nn.Linear(8,8))
        def forward(s,x): return x + s.lin(x)
    b=W().eval(); x=torch.randn(2,8); v={k:t.clone() for k,t in b.state_dict().items()}
    pr=Presence(Block("b", b, None, True)); 
    pr.free()
    try: print(b.lin.weight.sum())
    except Exception as e: print(type(e).__name__, str(e)[:150])
    print(sum(t.nbytes for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape==(8,8) and not t.is_meta)//256)
    pr.allocate(); b.load_state_dict(v)
    try: print(b.lin.weight.sum())
    except Exception as e: print(type(e).__name__, str(e)[:150])
    y0=b(x).detach()
    pr.free(); pr.allocate(); b.load_state_dict(v); assert torch.equal(b(x),y0); pr.free() if False else None
# causes
import weakref
def cause(f):
    b=nn.Linear(8,8); pr=Presence(Block("layer.b", b, None, True)); keep=f(b)
    try: pr.free(); print("freed")
    except RuntimeError as e: print(e)
class Lit: pass
L=Lit(); L.losses=[]
def graph(b): L.losses.append(b(torch.ones(2,8)).sum())
def view(b): L.view = b.weight.view(-1)
def weak(b): L.ref = weakref.ref(b.weight)
def cycle(b):
    o = b(torch.ones(2,8)); d={"o":o}; d["d"]=d
class Node: pass
cause(graph); cause(view); cause(weak); cause(cycle)
