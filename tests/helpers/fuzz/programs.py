"""Programs: a module's ``forward`` as lines of Python, chosen at random and kept if they run.

The lines mix every form of a linear with views, writes, ``out=``, casts, autocast, control flow, attention with shared
heads, and weights that are shared, sliced or written to. Between calls of a program its weights may change.
"""

from __future__ import annotations

import dataclasses
import random
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from writes import WRITES

K = 16  # features of most values; a power of two times a few, so that heads can be made of them


class Weights(nn.Module):
    """What every program finds in ``self``."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def number(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        for i in range(3):
            self.register_parameter(f"w{i}", nn.Parameter(number(K, K) / 2, requires_grad=False))
            self.register_buffer(f"b{i}", number(K))
            self.register_buffer(f"c{i}", number(4, K))
        with torch.random.fork_rng():
            self.l0, self.l1, self.l2 = nn.Linear(K, K), nn.Linear(K, 2 * K, bias=False), nn.Linear(K, K)
        self.norm = nn.LayerNorm(K)
        for parameter in (*self.l0.parameters(), *self.l1.parameters(), *self.l2.parameters()):
            parameter.data = number(*parameter.shape) / 2
        self.tied = self.l0
        self.e = nn.Parameter(number(4, K, K) / 2)
        self.to(dtype).requires_grad_(False)


#: {v}: a value, {s}: a weight [K, K], {b}: a vector [K], {c}: a buffer, {n}: a number; {t} = the line's own new name
LINES = {
    "linear": [
        "{t} = F.linear({v}, {s})",
        "{t} = F.linear({v}, {s}, {b})",
        "{t} = F.linear({v}, {s}, bias={b})",
        "{t} = F.linear(bias={b}, weight={s}, input={v})",
        "{t} = F.linear({v}, {s}, {b} * 2)",
        "{t} = F.linear({v}, {s}, {c}[:1])",
        "{t} = F.linear({v}, {s}[4:12])",
        "{t} = F.linear({v}, {s}.detach())",
        "{t} = F.linear({v}, {s}.t().contiguous())",
        "{t} = F.linear({v}, {s}.data)",
        "{t} = F.linear({v}, {s}, torch.zeros(()).to({v}.dtype))",
        "{t} = self.l0({v})",
        "{t} = self.l1({v})[..., :16]",
        "{t} = self.l2({v})",
        "{t} = self.tied({v})",
        "{t} = {v} @ {s}",
        "{t} = {v} @ {s}.t()",
        "{t} = {v}.matmul({s}.mT)",
        "{t} = torch.matmul(input={v}, other={s}.T)",
        "{t} = {v}.__matmul__({s})",
        "{t} = {v} @ {s}.permute(1, 0)",
        "{t} = torch.einsum('...k,nk->...n', {v}, {s})",
        "{t} = torch.einsum('kn,...k->...n', {s}, {v})",
        "{t} = torch.ops.aten.einsum.default(equation='...k,nk->...n', tensors=[{v}, {s}])",
        "{t} = torch.mm({v}.reshape(-1, 16), {s})",
        "{t} = torch.mm({v}.reshape(-1, 16), mat2={s}.t())",
        "{t} = torch.addmm({b}, {v}.reshape(-1, 16), {s})",
        "{t} = torch.addmm({b}, {v}.reshape(-1, 16), {s}, alpha={n})",
        "{t} = torch.addmm({c}[:1], {v}.reshape(-1, 16), {s}.t())",
        "{t} = {b}.addmm({v}.reshape(-1, 16), {s})",
        "{t} = torch.ops.aten.linear.default({v}, {s}, {b})",
        "{t} = torch.ops.aten.linear({v}, {s})",
        "{t} = torch.ops.aten.mm({v}.reshape(-1, 16), {s})",
        "{t} = torch.vmap(lambda r: F.linear(r, {s}, {b}))({v})",
        "{t} = {v}[0] @ {s}",
    ],
    "several": [
        "q, k, {t} = F.linear({v}, self.w0), F.linear({v}, self.w1), F.linear({v}, self.w2)",
        "q, {t} = F.linear({v}, self.w0, self.b0), F.linear({v}, self.w1, self.b1)",
        "q = F.linear({v}, self.w0, self.b0); {w}; {t} = F.linear({v}, self.w1, self.b1) + q",
        "q = self.l0({v}); {w}; {t} = self.l2({v}) * q.sigmoid()",
        "q = self.l0({v}); {w}; {t} = q + self.l1({v})[..., 16:]",
        "for m in (self.l0, self.l2): {t} = m({v}); {w}",
    ],
    "experts": [
        "i = torch.arange({v}.numel() // 16) % 4; {t} = torch.bmm(self.e[i], {v}.reshape(-1, 16, 1)).squeeze(-1)",
        "q = self.e[torch.arange({v}.numel() // 16) % 3 - 2]; {w}; {t} = torch.bmm({v}.reshape(-1, 1, 16), q)[:, 0]",
        "i = torch.arange({v}.numel() // 16) % 4; q = self.e[i].mT; i *= 0; {t} = ({v}.reshape(-1, 1, 16) @ q).sum(1)",
        "q = self.e[torch.arange({v}.numel() // 16) % 4]; q *= -2; {t} = (q @ {v}.reshape(-1, 16, 1))[..., 0]",
        "i = torch.arange(1) + 2; {t} = torch.matmul({v}.reshape(-1, 1, 16), self.e[i].mT).squeeze(1)",
        "q = torch.bmm({v}.reshape(1, -1, 16).repeat(4, 1, 1), self.e.transpose(1, 2)); {w}; {t} = q[1] + q[2]",
        "{t} = torch.einsum('sk,enk->sn', {v}.reshape(-1, 16), self.e)",
        "assert self.e.dtype is torch.bfloat16; q = {v}.reshape(-1, 16); i = torch.arange(1, 5).int() * len(q) // 4; "
        "{t} = torch._grouped_mm(q, self.e.mT, offs=i)",
        "self.e.mul_(-2); q = self.e[torch.ones(3).long()]; {t} = torch.bmm(q, {v}.reshape(-1, 16, 1)[:3])[..., 0]",
    ],
    "out": [
        "{t} = torch.mm({v}.reshape(-1, 16), {s}, out=torch.empty({v}.numel() // 16, 16, dtype={v}.dtype))",
        "{t} = torch.empty({v}.numel() // 16, 16, dtype={v}.dtype); torch.mm({v}.reshape(-1, 16), {s}, out={t})",
        "{t} = torch.zeros_like({v}); torch.matmul({v}, {s}, out={t})",
        "{t} = torch.zeros_like({v}); torch._C._nn.linear({v}, {s}, {b}, out={t})",
        "torch.matmul(self.c0, {s}, out=self.c1); {t} = self.c1 + 1",
        "torch.addmm(self.b0, self.c0, {s}, out=self.c2); {t} = self.c2 * 1",
        "{t} = {v}.clone(); torch.mul({t}, {n}, out={t})",
    ],
    "write": ["{w}"],
    "view": [
        "{t} = {v}.view(-1, 16)",
        "{t} = {v}[1:]",
        "{t} = {v}[..., 0:16]",
        "{t} = {v}.detach()",
        "{t} = {v}.unsqueeze(0)",
        "{t} = {v}.transpose(0, -2)",
        "{t} = {v}.flatten(0, -2)",
        "{t} = {v}.chunk(2)[0]",
        "{t} = {v}.unbind(0)[0]",
        "{t} = {v}.expand_as({v})",
        "{t} = {v}.reshape(-1, 2, 16)",
        "{t} = {v}.narrow(0, 0, 1)",
        "{t} = {v}.view({v}.shape)",
        "{t} = {v}.contiguous()",
        "{t} = {v}.as_strided({v}.shape, {v}.stride())",
        "{t} = self.c0[:2]",
        "{t} = {s}[:3]",
    ],
    "reshape in place": [
        "{v}.unsqueeze_(0)",
        "{v}.squeeze_(0)",
        "{v}.transpose_(0, -2)",
        "{t} = {v}.clone().unsqueeze_(0)",
    ],
    "pointwise": [
        "{t} = {v}.clone()",
        "{t} = {v}.tanh()",
        "{t} = F.silu({v})",
        "{t} = F.gelu({v}) + {v}",
        "{t} = self.norm({v})",
        "{t} = F.softmax({v}, -1) * {n}",
        "{t} = torch.cat([{v}, {v}])",
        "{t} = torch.where({v} > 100, {v}, {v} * {n})",
        "{t} = {v} + {b}",
        "{t} = {v} * 8",
        "{t} = F.dropout({v}, 0.5, False)",
        "{t} = F.embedding(torch.tensor([0, 2, 1]), {s})",
        "{t} = F.embedding(torch.tensor([0, 2, 1]), {s}, max_norm=0.5)",
        "{t} = F.batch_norm({v}.reshape(-1, 16), self.b0, self.b1.abs_(), training=True)",
    ],
    "cast": [
        "{t} = {v}.bfloat16().to({v}.dtype)",
        "{t} = F.linear({v}.bfloat16(), {s}.bfloat16()).to({v}.dtype)",
        "{t} = F.linear({v}.double(), {s}.double()).to({v}.dtype)",
    ],
    "region": [
        "with torch.autocast('cpu', dtype=torch.bfloat16): {t} = F.linear({v}, {s}, {b}).to({v}.dtype)",
        "with torch.autocast('cpu', enabled=False): {t} = self.l0({v})",
        "with torch.no_grad(): {t} = self.l2({v})",
        "with torch.enable_grad(): {t} = self.l2({v}).detach()",
        "q = self.l0({v})\nwith torch.autocast('cpu', dtype=torch.bfloat16): {t} = self.l2({v}).to({v}.dtype) + q",
    ],
    "control": [
        "{t} = self.l0({v}) if {v}.shape[0] > 2 else self.l2({v})",
        "{t} = torch.cond({v}.sum() > -1e9, lambda x: F.linear(x, {s}), lambda x: F.linear(x + 1, {s}), ({v},))",
        "{t} = torch.utils.checkpoint.checkpoint(lambda x: self.l0(x).tanh(), {v}, use_reentrant=False)",
        "for i in range({v}.dim()): {t} = self.l0({v}) + i",
        "if float({v}.detach().sum()) > -1e9: {t} = self.l2({v})",
        "torch._dynamo.graph_break(); {t} = {v} * 1",
    ],
    "attention": [
        "h = {v}.reshape(1, -1, 4, 4).transpose(1, 2)[:, :2].contiguous()\n"
        "k = h[:, :, None].expand(1, 2, 2, h.shape[2], 4).reshape(1, 4, h.shape[2], 4)\n"
        "u = (h * 2)[:, :, None].expand(1, 2, 2, h.shape[2], 4).reshape(1, 4, h.shape[2], 4)\n"
        "{wh}\n"
        "{t} = F.scaled_dot_product_attention({v}.reshape(1, -1, 4, 4).transpose(1, 2), k, u)"
        ".transpose(1, 2).reshape(-1, 16)",
    ],
}
_WEIGHTS = {"linear": 10, "several": 5, "out": 2, "write": 5, "view": 4, "reshape in place": 1, "pointwise": 3}
_WEIGHTS |= {"cast": 1, "region": 2, "control": 2, "attention": 1, "experts": 3}

#: what may happen to a program's weights between two of its calls
BETWEEN = (
    "pass",
    "self.w0.mul_(-2)",
    "self.e.mul_(-2)",
    "self.w1.data.mul_(-2)",
    "self.w2 = nn.Parameter(self.w2 * -2, requires_grad=False)",
    "self.load_state_dict({k: v * -1 for k, v in self.state_dict().items()})",
    "self.l0.weight.data = self.l0.weight * -2",
    "torch._foreach_mul_([self.w0, self.l2.weight], -2.0)",
    "self.l0, self.l2 = self.l2, self.l0",
    "self.b0.copy_(self.b1)",
    "self.w0.view(-1)[3:90].neg_()",
)


@dataclasses.dataclass
class Program:
    """Lines of a ``forward(self, x, y)``, what it returns, and how it is called."""

    seed: int
    lines: list[str]
    returned: list[str]
    between: str = "pass"
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] = (3,)
    inductor: bool = False

    @property
    def source(self) -> str:
        body = "\n".join(f"    {part}" for line in self.lines for part in line.split("\n"))
        return f"def forward(self, x, y):\n{body or '    pass'}\n    return ({', '.join(self.returned)},)\n"

    def __str__(self) -> str:
        how = f"# seed {self.seed}, {self.dtype}, batches {self.batches}, between calls: {self.between}"
        return f"{how}\n{self.source}"

    def build(self) -> nn.Module:
        """A module that runs it, with weights of its own that are the same each time."""
        space = namespace()
        exec(compile(self.source, f"<program {self.seed}>", "exec"), space)
        module = Weights(self.seed, self.dtype)
        module.forward = space["forward"].__get__(module)  # type: ignore[method-assign]
        return module

    def inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + batch)
        x = torch.randn(batch, K, generator=generator)
        x[..., 5] *= 8  # an outlier column
        return x.to(self.dtype), torch.randn(2, batch, K, generator=generator).to(self.dtype)


def namespace() -> dict[str, object]:
    return {"torch": torch, "nn": nn, "F": F, "WRITES": WRITES}


def program(seed: int) -> Program:
    """The program of a seed."""
    choose = random.Random(seed)
    dtype = choose.choice([torch.float32] * 4 + [torch.bfloat16, torch.float16])
    batches = choose.choice([(3,), (3, 3), (3, 5), (2, 4, 1)])
    made = Program(seed, [], ["x"], choose.choice(BETWEEN), dtype, batches)
    values, module = dict(zip(("x", "y"), made.inputs(3), strict=True)), Weights(seed, dtype)
    for number in range(choose.randint(3, 14)):
        kind = choose.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        line = _filled(choose.choice(LINES[kind]), f"v{number}", list(values), choose)
        if _runs(line, values, module):
            made.lines.append(line)
    names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
    made.returned = choose.sample(names, min(len(names), choose.randint(1, 4)))
    if names[-1] not in made.returned:
        made.returned.append(names[-1])
    made.returned = [name if choose.random() < 0.6 else f"{name} * 1" for name in made.returned]
    return made


def _filled(template: str, target: str, values: list[str], choose: random.Random) -> str:
    weight = choose.choice(["self.w0", "self.w1", "self.w2", "self.l0.weight", "self.w0.t()"])
    bias, buffer = choose.choice(["self.b0", "self.b1", "self.l0.bias"]), f"self.c{choose.randrange(3)}"
    value = choose.choice([*values[-4:], "x"])
    places = [value, *values[-3:], weight, bias, buffer, f"{weight}[2:5]", f"{value}.view(-1)"]
    heads = ["h", "k", "u", "k[:, 1:]", "u.view(-1)"]

    def write(place: str) -> str:
        return f"WRITES[{choose.choice(list(WRITES))!r}]({place})"

    filled = {"t": target, "v": value, "s": weight, "b": bias, "c": buffer, "n": str(choose.choice([-2, 0.5, 3]))}
    filled["w"] = write(choose.choice(places))
    filled["wh"] = write(choose.choice(heads)) if choose.random() < 0.7 else "pass"
    return template.format(**filled)


def _runs(line: str, values: dict[str, object], module: nn.Module) -> bool:
    """Whether a line runs after those before it; if so ``values`` are those after it."""
    space = {**namespace(), **values, "self": module}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(line, space)
    except Exception:
        return False
    found = {k: v for k, v in space.items() if isinstance(v, torch.Tensor)}
    if any(v.numel() > 4096 or v.numel() == 0 or not v.isfinite().all() for v in found.values()):
        return False  # (what the line wrote to inputs or weights stays written: the next lines see it)
    values.clear()
    values.update(found)
    return True
