import torch, weakref, traceback
from torch import nn
from resist_lightning.references import who_holds
class L: pass
l=L(); w=nn.Linear(8,8); l.ref=weakref.ref(w.weight)
try: print(who_holds(w.weight))
except RecursionError: 
    t=traceback.format_exc().splitlines(); print("\n".join(t[:12]+t[-12:]))
l.ref=None; x=torch.randn(2,8,requires_grad=True); l.losses=[w(x)]
print(who_holds(w.weight))
def f():
    loss=w(x); print(who_holds(w.weight))
l.losses=None; f()
l.v = w.weight[0]; print(who_holds(w.weight))
l.v=None; import numpy as np; l.v=w.weight.detach(); print(who_holds(w.weight), w.weight._use_count())
