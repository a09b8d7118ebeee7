import torch, copy, pickle, io
from torch import nn, Tensor
from torch.utils import swap_tensors
import torch.nn.functional as F
class PME(RuntimeError): pass
class _Absent:
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise PME(f"{func}")
    def __repr__(self): return "absent"
    def __deepcopy__(self, memo): raise PME("deepcopy")
    def __reduce_ex__(self, p): raise PME("pickle")
    def tolist(self): raise PME("tolist")
    def numpy(self, **k): raise PME("numpy")
class AP(_Absent, nn.Parameter): pass
class AT(_Absent, torch.Tensor): pass
p = nn.Parameter(torch.randn(8, 8)); keep = p.detach().clone()
p.foo = 3
def free(p):
    m = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device="meta")
    new = Tensor._make_subclass(AP, m, p.requires_grad)
    new.__dict__.update(p.__dict__)
    swap_tensors(p, new)
opt = torch.optim.AdamW([p, nn.Parameter(torch.ones(3))])
F.linear(torch.ones(2,8), p).sum().backward(); opt.step(); p.grad=None
i = id(p)
free(p)
print(type(p), p.shape, p.dtype, p.requires_grad, p.is_leaf, p.grad, p.is_meta, p.device, p.stride(), p.numel(), p.nbytes, repr(p), isinstance(p, nn.Parameter), hash(p)==i, p.foo, p.data_ptr(), p.untyped_storage().nbytes(), p.dim(), len(p), p.element_size(), p.is_floating_point(), p._version, f"{p}", p.is_contiguous(), p.layout, p.is_cuda, p.names if False else '', p.grad_fn)
d=p; q=nn.Parameter(torch.empty(8,8,3,3)); free(q); b=torch.nn.Parameter(torch.empty(8,dtype=torch.bool),requires_grad=False); free(b); mask=b
ops = {"add_": lambda e: e.add_(d), "add_ alpha": lambda e: e.add_(d, alpha=.1), "sub_": lambda e: e.sub_(d), "mul_": lambda e: e.mul_(d), "div_": lambda e: e.div_(d), "addcmul_": lambda e: e.addcmul_(d, d), "lerp_": lambda e: e.lerp_(d, .1), "copy_": lambda e: e.copy_(d), "e + d": lambda e: e + d, "e * d": lambda e: e * d, "+=": lambda e: e.__iadd__(d), "e*.9 + d*.1": lambda e: e * .9 + d * .1, "foreach_add_": lambda e: torch._foreach_add_([e], [d], alpha=.1), "foreach_mul": lambda e: torch._foreach_mul_([e], [d]), "max": lambda e: torch.maximum(e, d), "where": lambda e: torch.where(d > 0, e, e), "where2": lambda e: torch.where(e > 0, d, e),"matmul": lambda e: e @ d, "linear": lambda e: F.linear(e, d), "cat": lambda e: torch.cat([e, d]), "stack": lambda e: torch.stack([e, d]), "conv2d": lambda e: F.conv2d(torch.ones(1, 8, 8, 8), q), "conv_t": lambda e: F.conv_transpose2d(torch.ones(1, 8, 8, 8), q), "bmm": lambda e: torch.bmm(e[None], d[None]), "einsum": lambda e: torch.einsum("ij,jk->ik", e, d), "cosine": lambda e: F.cosine_similarity(e, d), "mse": lambda e: F.mse_loss(e, d), "addmm": lambda e: torch.addmm(e, e, d), "norm": lambda e: d.norm().item(), "numpy": lambda e: d.numpy(), "tolist": lambda e: d.tolist(), "allclose": lambda e: torch.allclose(e, d), "batch_norm": lambda e: F.batch_norm(e, None, None, d[0], d[0], True), "layer_norm": lambda e: F.layer_norm(e, (8,), d[0], d[0]), "embedding": lambda e: F.embedding(torch.tensor([0]), d), "prelu": lambda e: F.prelu(e, d[0]), "index": lambda e: e[d.long()], "scatter": lambda e: e.scatter_(0, torch.zeros(8, 8, dtype=torch.long), d), "index_copy": lambda e: e.index_copy_(0, torch.arange(8), d), "setitem": lambda e: e.__setitem__(slice(None), d),
"maskidx": lambda e: e[mask], "masksetitem": lambda e: e.__setitem__(mask, 0.), "out": lambda e: torch.add(e,e,out=d), "detach": lambda e: d.detach(), "data": lambda e: d.data, "setdata": lambda e: setattr(d,"data",e), "cpu": lambda e: d.cpu(), "to": lambda e: d.to("cpu"), "to64": lambda e: d.to(torch.float64), "item": lambda e: d[0,0].item(), "bool": lambda e: bool(d), "iter": lambda e: list(d), "view": lambda e: d.view(-1), "T": lambda e: d.T, "np": lambda e: __import__("numpy").asarray(d), "tensor": lambda e: torch.tensor([d]), "as_tensor": lambda e: torch.as_tensor(d), "new_tensor": lambda e: e.new_tensor(d), "dlpack": lambda e: torch.utils.dlpack.to_dlpack(d), "__dlpack__": lambda e: d.__dlpack__(), "deepcopy": lambda e: copy.deepcopy(d), "copy": lambda e: copy.copy(d), "pickle": lambda e: pickle.dumps(d), "save": lambda e: torch.save({"a":d}, io.BytesIO()), "jit": lambda e: torch.jit.script(jf)(e,d), "zeros_like": lambda e: torch.zeros_like(d), "fill_": lambda e: d.data.fill_(0), "normal_": lambda e: nn.init.normal_(d), "zero_": lambda e: d.zero_(), "storage": lambda e: d.untyped_storage().tolist(), "set_": lambda e: e.set_(d), "eq": lambda e: e.eq(d), "==": lambda e: e==d, "equal": lambda e: torch.equal(e,d), "histc": lambda e: torch.histc(d), "linalg": lambda e: torch.linalg.norm(d), "get_total_norm": lambda e: nn.utils.get_total_norm([d]), "p2v": lambda e: nn.utils.parameters_to_vector([d]), "v2p": lambda e: nn.utils.vector_to_parameters(e.view(-1),[d]), "share": lambda e: d.share_memory_(), "is_shared": lambda e: d.is_shared(), "pin": lambda e: d.pin_memory(), "fcall": lambda e: torch.func.functional_call(nn.Linear(8,8), {"weight": d}, (e,)), "vmap": lambda e: torch.vmap(lambda a,b: a+b)(e,d), "grad": lambda e: torch.func.grad(lambda a: (a*e).sum())(d), "stack_module": lambda e: torch.func.stack_module_state([nn.Linear(2,2)]), "float": lambda e: d.float(), "half": lambda e: d.half(), "swapdata": lambda e: setattr(nn.Parameter(torch.ones(8,8)), "data", d), "Parameter(d)": lambda e: nn.Parameter(d), "grad=": lambda e: setattr(d,"grad",e), "requires_grad_": lambda e: d.requires_grad_(True), "autograd.grad": lambda e: torch.autograd.grad((e.requires_grad_()*2).sum(), [e, d], allow_unused=True), "reg_hook": lambda e: d.register_hook(print).remove(), "storage2": lambda e: d.storage()[0], "format": lambda e: f"{d:.3f}", "no_grad add_": lambda e: d.data.add_(e), "pow": lambda e: d**2, "sum": lambda e: d.sum(), "foreach_norm": lambda e: torch._foreach_norm([d]), "foreach_copy": lambda e: torch._foreach_copy_([e],[d]), "lstm": lambda e: torch._VF.lstm(torch.ones(2,1,8),(torch.zeros(1,1,2),torch.zeros(1,1,2)),[d,d,d,d],True,1,0.,False,False,False), "masked_fill": lambda e: e.masked_fill_(d.bool(), 0), "multi": lambda e: F.multi_head_attention_forward(e[:,None],e[:,None],e[:,None],8,2,d,None,None,None,False,0.,e,None), "cpu_numpy": lambda e: d.detach().cpu().numpy(), "size": lambda e: d.size(), "ctypes": lambda e: d.data_ptr()}
def jf(a, b):
    return a.add_(b)
jf.__annotations__ = {}
import sys
for n, f in ops.items():
    e = torch.ones(8, 8)
    try:
        r = f(e); print(f"{n:14} NO ERROR ", type(r), repr(r)[:60].replace("\n"," "))
    except PME as x: print(f"{n:14} ok {x}") if "-v" in sys.argv else None
    except BaseException as x: print(f"{n:14} raises {type(x).__name__} {str(x)[:150]}")
# back
new = nn.Parameter(keep.clone()); new.__dict__.update(p.__dict__)
swap_tensors(p, new)
print(type(p), torch.equal(p, keep), p.requires_grad, p.grad, id(p)==i)
F.linear(torch.ones(2,8), p).sum().backward(); opt.step(); print(p.grad.shape)
