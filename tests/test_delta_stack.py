"""Stacks beside the rules' arithmetic: types, what a model reads of them, adoption, the generic rule, coverage."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from delta_cases import Q, World
from finf_fast.delta.engine import Carrying
from finf_fast.delta.stack import Changed, Group, NotCarried, Stack
from finf_fast.delta.table import IN_PLACE, RULES, State, current, fresh, name_of, words

H = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.0]])


def still(h=H, queries=Q):
    """A stack that no query changes."""
    return Stack(torch.cat([h[None], torch.zeros(queries, *h.shape, dtype=h.dtype)]))


def moving(h=H, queries=Q):
    """A stack of which every query changes the first number, and the last of them every number."""
    s = still(h, queries)
    s.stacked[1:].view(queries, -1)[:, 0] = 5.0
    s.stacked[-1] -= 1.5
    return s


def routes(*rows):
    return Stack(torch.tensor(rows))


TOPICS = ("arithmetic", "functions", "indexing", "layers", "products", "reductions", "structure")
READ = words(
    "__bool__ __int__ __float__ __index__ __complex__ item tolist numpy __array__ nonzero __contains__ "
    "__dlpack__ data_ptr untyped_storage storage equal allclose is_nonzero unique unique_consecutive "
    "argwhere bincount histc bernoulli multinomial normal rand_like randn_like randint_like poisson "
    "uniform_ normal_ random_ bernoulli_"
)  # they give no tensor that could be compared, or none at all: held to account one by one below
PASSED_ON = words(
    "__add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ __mod__ __matmul__ __lt__ __le__ __gt__ __ge__ "
    "__ne__ __rand__ __ror__ __rxor__ __iadd__ __isub__ __imul__ __idiv__ __ifloordiv__ __imod__"
)  # torch hands these operators on under their methods' names
METHODS = (F.tanh, F.sigmoid)  # plain Python around the methods of that name, so no rule ever sees them


@pytest.mark.filterwarnings("ignore")
def test_every_rule_has_a_case():
    with fresh(State(Q)) as state:
        for topic in TOPICS:
            tests = importlib.import_module(f"test_delta_{topic}")
            for one in (*getattr(tests, "CASES", ()), *getattr(tests, "MOVES", ())):
                one.f(*(x.carried() for x in one.arguments(World(torch.float32))))
    missing = {name_of(f) for f in (*RULES, *IN_PLACE) if f not in (*state.carried, *METHODS)} - {*READ, *PASSED_ON}
    assert not missing, sorted(missing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "other", [2, 2.5, True, torch.tensor(2.0), torch.tensor(2), torch.ones(3), torch.ones(3, dtype=torch.int64), None]
)
def test_types_are_promoted_as_torch_promotes_them(dtype, other):
    x = still(H.to(dtype))
    other = still(torch.ones(3)) if other is None else other
    plain = torch.ones(3) if isinstance(other, Stack) else other
    for f in (
        torch.add,
        torch.mul,
        torch.sub,
        torch.div,
        torch.pow,
        lambda a, b: b * a,
        lambda a, b: torch.atan2(a, b),
    ):
        try:
            wanted = f(H.to(dtype), plain)
        except (TypeError, RuntimeError):  # atan2 takes no number, and no boolean is taken off
            continue
        found = f(x, other)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, (f, found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_number_is_compared_in_the_type_of_the_tensor(dtype):
    x = torch.full((3,), 0.1, dtype=dtype)
    assert (still(x) == 0.1).all() and (still(x) >= 0.1).all() and not (still(x) < torch.tensor(0.1)).any()


def test_infinite_values_that_do_not_change_stay():
    h = torch.tensor([-math.inf, 1.0, math.inf, -math.inf])
    x = Stack(torch.stack([h, torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.zeros(4)]))
    for f in (torch.exp, torch.relu, torch.tanh, torch.sigmoid, F.softplus, torch.abs, torch.erf, lambda x: x + 1):
        found = f(x).stacked
        torch.testing.assert_close(found[0], f(h), msg=str(f))
        assert torch.equal(found[1:, [0, 2, 3]], torch.zeros(2, 3)) and found[1, 1] > 0 and found[2, 1] == 0, f
    for f in (lambda x: x * 2, lambda x: x / 2, lambda x: x - 1, lambda x: x.clamp(-1, 3), lambda x: x[[1, 0, 2, 3]]):
        assert torch.equal(f(x).stacked[0], f(h)) and torch.isfinite(f(x).stacked[1:]).all()
    assert torch.equal(x.max(0).values.stacked[1:], torch.zeros(2))
    assert torch.equal(x.lgamma().stacked[1:, [0, 2]], torch.zeros(2, 2))


@pytest.mark.parametrize("step", [1e-6, 1.0, 30.0, 300.0])
def test_masked_scores(step):
    h = torch.tensor([[-math.inf, 1.0, 2.0], [0.5, -math.inf, -math.inf]], dtype=torch.float64)
    d = torch.tensor([[0.0, 1.0, -0.3], [1.0, 0.0, 0.0]], dtype=torch.float64) * step
    x = Stack(torch.stack([h, d]))
    for f in (lambda x: x.softmax(-1), lambda x: x.logsumexp(-1), lambda x: x.log_softmax(-1)):
        true, found = f(h + d) - f(h), f(x).stacked[1]
        true, found = (torch.where(torch.isfinite(h), y, 0) if y.dim() == 2 else y for y in (true, found))
        assert (found - true).norm() <= 1e-8 * true.norm() + 1e-14


def test_what_agrees_is_plain_again():
    x = moving()
    assert type(x > 100) is Tensor and type(still().argmax(-1)) is Tensor and type(x.isnan()) is Tensor
    assert isinstance(x > 0, Stack) and isinstance(x.argmax(-1), Stack)
    assert (x > 0).stacked.shape == (1 + Q, 2, 3) and (x > 0).dtype is torch.bool


READERS = {
    "bool": lambda x: bool(x[0, 0] > 2),
    "if": lambda x: 1 if x.sum() > 3 else 0,
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "complex": lambda x: complex(x[0, 0]),
    "index": lambda x: [1, 2, 3, 4, 5, 6][x[0].argmax()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy().sum(),
    "array": lambda x: x.__array__().sum(),
    "nonzero": lambda x: (x > 0).nonzero().tolist(),
    "torch.nonzero": lambda x: [i.tolist() for i in torch.nonzero(x > 0, as_tuple=True)],
    "in": lambda x: 1.0 in x,
    "where": lambda x: [i.tolist() for i in torch.where(x > 0)],
    "argwhere": lambda x: torch.argwhere(x > 0).tolist(),
    "mask": lambda x: x[x > 0].tolist(),
    "masked_select": lambda x: x.masked_select(x > 0).tolist(),
    "equal": lambda x: torch.equal(x, H),
    "allclose": lambda x: torch.allclose(x, H),
    "is_nonzero": lambda x: torch.is_nonzero(x[0, 0] > 2),
    "unique": lambda x: torch.unique(x).tolist(),
    "unique_consecutive": lambda x: x.unique_consecutive().tolist(),
    "bincount": lambda x: torch.bincount((x[0] > 2) * 2).tolist(),
    "histc": lambda x: torch.histc(x, 3, -4, 4).tolist(),
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.filterwarnings("ignore:__array__")
def test_values_are_read_where_all_agree_and_never_where_not(read):
    wanted = READERS[read](H)
    assert READERS[read](still()) == wanted
    with pytest.raises(NotCarried):
        READERS[read](moving())


def test_numbers_that_agree_leave_as_numpy_and_dlpack():
    assert still().__dlpack__() is not None
    assert still().data_ptr() and still().untyped_storage() is not None and still().storage() is not None
    for read in (Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage):
        with pytest.raises(NotCarried):
            read(moving())


RANDOM = {
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x.bernoulli_(0.5),
    "multinomial": lambda x: torch.multinomial(x.abs(), 1),
    "normal": lambda x: torch.normal(x),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 3),
    "poisson": lambda x: torch.poisson(x.abs()),
    "uniform_": lambda x: x.uniform_(),
    "normal_": lambda x: x.normal_(),
    "random_": lambda x: x.random_(),
    "exponential_": lambda x: x.exponential_(),
    "gumbel_softmax": F.gumbel_softmax,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, train=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_draws_are_refused(name):
    with pytest.raises(NotCarried):
        RANDOM[name](still())


def _without_rules(f, x):
    with torch._C.DisableTorchFunctionSubclass():
        return f(x)


REFUSED = {
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "bytes": lambda x: x.view(torch.int32),
    "no rule in place": lambda x: x.lgamma_(),
    "transpose_": lambda x: x[:2, :2].transpose_(0, 1),
    "t_": lambda x: x[:2, :2].t_(),
    "squeeze_": lambda x: x[:1].squeeze_(0),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "shapes": lambda x: torch.repeat_interleave(x, (x[0] > 2).long(), dim=1),
    "one_hot": lambda x: F.one_hot((x > 0).long()),
    "max_norm": lambda x: F.embedding(torch.tensor([0]), x, max_norm=1.0),
    "below the rules": lambda x: _without_rules(torch.sin, x),
    "places": lambda x: x.__setitem__(x > 0, 0.0),
    "index_add": lambda x: x.index_add(0, (x[:, 0] > 2).long(), x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    with pytest.raises(NotCarried):
        REFUSED[name](moving())


def test_a_changed_parameter_is_not_written():
    w = Changed(H.clone(), [Group((0,), torch.ones(1, 2, 3))], Q)
    with pytest.raises(NotCarried, match="its own changed tensors"):
        w.add_(1)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9])
def test_without_a_rule_float64_is_used_and_counted(size):
    x = Stack(torch.cat([2 + torch.rand(1, 3, 4), size * torch.randn(Q, 3, 4)]))
    with fresh(State(Q)) as state:
        found = torch.lgamma(x).stacked, torch.special.i0(x).stacked
    assert state.generic == {"lgamma": 1, "special_i0": 1}
    h, d = x.stacked[0].double(), x.stacked[1:].double()
    for one, f in zip(found, (torch.lgamma, torch.special.i0), strict=True):
        true = f(h + d) - f(h)
        assert one.dtype is torch.float32 and (one[1:] - true).norm() <= (1e-7 + 1e-15 / size) * true.norm()


def test_a_rule_is_not_counted_as_generic():
    with fresh(State(Q)) as state:
        x = moving()
        F.gelu(x @ x.mT + 1).softmax(-1).topk(1)
    assert not state.generic and current() is not state


@pytest.fixture
def carrying():
    state = State(Q)
    with fresh(state), Carrying(state):
        yield state


def test_plain_tensors_that_are_written_into_become_stacks(carrying):
    x, sums, table, total = moving(), torch.zeros(4, 3), torch.zeros(3, 2, 3), torch.ones(2, 3)
    sums.index_add_(0, torch.tensor([3, 1]), x)
    table[1] = x
    table[0, 0] = x[1] * 2
    total += x
    assert torch.equal((sums * 1).stacked[:, [3, 1]], x.stacked) and not (sums * 1).stacked[:, [0, 2]].any()
    assert torch.equal(table[1].stacked, x.stacked) and torch.equal(table[0, 0].stacked, 2 * x.stacked[:, 1])
    assert torch.equal((total + 0).stacked[0], H + 1) and torch.equal((total + 0).stacked[1:], x.stacked[1:])
    wide = torch.zeros(4, 2, 3)
    wide.copy_(x)
    assert torch.equal((wide + 0).stacked, x.stacked[:, None].expand(-1, 4, -1, -1))
    out = torch.empty(2, 3)
    torch.mul(x, 2, out=out)
    assert torch.equal(torch.abs(out).stacked[0], (2 * H).abs())


def test_views_of_what_became_a_stack_are_refused(carrying):
    x, room = moving(), torch.zeros(2, 3)
    view = room[0]
    room.copy_(x)
    with pytest.raises(NotCarried, match="a view"):
        view + 1
    with pytest.raises(NotCarried, match="a part"):
        torch.zeros(4, 3)[:2].copy_(x)


def test_integers_written_into_plain_integers(carrying):
    places, i = torch.zeros(3, dtype=torch.int64), routes(*[[0, 1, 2 + j] for j in range(1 + Q)])
    places += i
    assert torch.equal((places * 1).stacked, i.stacked)


def test_results_may_go_to_several_outs():
    x, values, places = moving(), still(torch.zeros(2)), Stack(torch.zeros(1 + Q, 2, dtype=torch.int64))
    torch.max(x, 1, out=(values, places))
    wanted = x.max(1)
    assert torch.equal(values.stacked, wanted.values.stacked) and torch.equal(places.stacked, wanted.indices.stacked)


def test_views_alias():
    x = still(torch.zeros(2, 3))
    column = x[:, 1]
    column += 1
    x.view(-1)[0] = 7.0
    x.mT[2].mul_(0).add_(moving()[:, 0])
    assert torch.equal(x.stacked[0], torch.tensor([[7.0, 1.0, 1.0], [0.0, 1.0, 0.5]]))
    assert torch.equal(x.stacked[1:, :, 2], moving().stacked[1:, :, 0])


def test_rms_norm_without_eps_is_torch_s():
    for dtype in (torch.bfloat16, torch.float32):
        h = (1e-3 * H).to(dtype)
        assert torch.allclose(F.rms_norm(still(h), (3,)).stacked[0], F.rms_norm(h, (3,)), rtol=1e-2)
