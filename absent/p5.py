import torch,gc
from tests.helpers.nets import residual_block
from resist_lightning.references import who_holds, _users, _leads_to
b,_=residual_block("preact"); b.train()
class K: pass
k=K(); k.losses=[b(torch.ones(1,8,6,6)).sum()]
w=b.bn1.weight
print([k.losses[0] is o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.grad_fn is not None])
n=k.losses[0].grad_fn
def walk(n,d=0):
    if d>9 or n is None: return
    print(" "*d, n.name(), getattr(n,"variable",None) is w, end="|")
    for m,_ in n.next_functions: walk(m,d+1)
walk(n); print(); print(who_holds(w))
