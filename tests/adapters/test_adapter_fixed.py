"""Decoding with fixed weights: the same logits from fewer products, and nothing kept where weights may have changed."""

from __future__ import annotations

import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qmemtune.adapters.queryable import FixedWeights, QueryableLinear, fixed_weights
from qmemtune.engine.fused import fused_layers

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "matmul", "baddbmm")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in PRODUCTS
        return function(*args, **(kwargs or {}))


def products(family, model, ids) -> int:
    """Matrix products of a second pass: groups of layers are known by then."""
    family.logits(model, ids)
    with Products() as counted:
        family.logits(model, ids)
    return counted.count


def twice_fixed(family, model, ids, **inputs):
    """Logits of two passes: layers that read the same input are joined from the second one on."""
    with fixed_weights(model):
        return family.logits(model, ids, **inputs), family.logits(model, ids, **inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 2}, {"block_size": 1}, {"center_queries": False}, {"router_norm": False}, {"depth_summary": False}],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 9)], ids=str)
def test_logits_are_those_of_a_plain_pass(family, options, shape):
    model = family.adapted(**options)
    ids = family.tokens(*shape)
    expected = family.logits(model, ids)
    for found in twice_fixed(family, model, ids):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_layers_that_read_the_same_input_share_their_products(llama):
    model, ids = llama.adapted(), llama.tokens(1, 1)
    plain = products(llama, model, ids)
    with fixed_weights(model):
        # Of seven adapted layers in each of four: three states and three operators less.
        assert products(llama, model, ids) <= plain - 4 * 6


def test_cached_decoding_gives_the_plain_passes_tokens(family):
    model = family.adapted()
    ids = family.tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    grown, seen = ids, mask
    for _ in range(8):
        positions = (seen.cumsum(dim=-1) - 1).clamp_min(0)
        logits = family.logits(model, grown, attention_mask=seen, position_ids=positions)
        grown = torch.cat([grown, logits[:, -1:].argmax(dim=-1)], dim=1)
        seen = torch.cat([seen, seen.new_ones(3, 1)], dim=1)
    assert found.tolist() == grown.tolist()


def test_changed_weights_count_in_the_next_generation(llama):
    model, ids = llama.adapted(), llama.tokens(2, 5)

    def scores():
        asked = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 2}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked).scores[0]

    before = scores()
    for name, parameter in model.named_parameters():
        if "queryable_" in name:
            parameter.data.mul_(1.5)  # past autograd's version counter
    torch.testing.assert_close(scores(), llama.logits(model, ids)[:, -1], **CLOSE)
    assert (scores() - before).abs().max() > 0.01


def test_it_may_be_opened_again_and_within_itself(llama):
    model, ids = llama.adapted(), llama.tokens(2, 5)
    expected = llama.logits(model, ids)
    weights = FixedWeights(model)
    for _ in range(2):
        with weights.held(), fixed_weights(model):
            torch.testing.assert_close(llama.logits(model, ids), expected, **CLOSE)
        assert llama.memory(model).holder.kept is None
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(llama.logits(model, ids), expected)


def test_a_forward_that_a_layer_had_is_put_back(llama):
    model, ids = llama.adapted(), llama.tokens(2, 5)
    expected = llama.logits(model, ids)
    with fused_layers(model):
        fused = [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]
        torch.testing.assert_close(twice_fixed(llama, model, ids)[1], expected, **CLOSE)
        plain = products(llama, model, ids)
        with fixed_weights(model):
            assert products(llama, model, ids) < plain
        assert [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__] == fused
    assert torch.equal(llama.logits(model, ids), expected)


def test_it_closes_after_an_error(llama):
    model, ids = llama.adapted(), llama.tokens(2, 5)
    with pytest.raises(IndexError), fixed_weights(model):
        llama.logits(model, ids + 10_000)
    assert llama.memory(model).holder.kept is None
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_gradients_inside_are_those_outside(llama):
    model, ids = llama.adapted(), llama.tokens(2, 6)
    llama.loss(model, ids).backward()
    expected = llama.gradients(model)
    with fixed_weights(model):
        llama.logits(model, ids)
        llama.loss(model, ids).backward()
        found = llama.gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_switched_off_or_another_adapter_is_heeded_inside(llama):
    model, ids = llama.adapted(), llama.tokens(2, 6)
    model.add_adapter("other", llama.config(r=8, block_size=1))
    llama.stir(model, seed=5)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = llama.logits(model, ids)
    model.set_adapter("default")
    with fixed_weights(model):
        torch.testing.assert_close(llama.logits(model, ids), expected["default"], **CLOSE)
        with model.disable_adapter():
            assert torch.equal(llama.logits(model, ids), llama.logits(llama.base(), ids))
        model.set_adapter("other")
        torch.testing.assert_close(llama.logits(model, ids), expected["other"], **CLOSE)


def test_threads_that_answer_at_once_do_not_meet(llama):
    model = llama.adapted()
    prompts = [llama.tokens(2, 4 + number, seed=number) for number in range(4)]
    expected = [llama.logits(model, ids) for ids in prompts]

    def answer(number: int) -> None:
        # Opened anew each time: the first passes are those in which layers find that they read one input.
        for _ in range(5):
            with fixed_weights(model):
                for _ in range(4):
                    found = llama.logits(model, prompts[number])
                    torch.testing.assert_close(found, expected[number], **CLOSE)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(answer, number) for number in range(4)]
        for done in answers:
            done.result()
    finally:
        sys.setswitchinterval(before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_inputs_of_a_long_prompt_are_let_go(llama):
    model, ids = llama.adapted(), llama.tokens(2, 40)
    inputs = []
    for module in model.modules():
        if isinstance(module, QueryableLinear):
            module.base_layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    with fixed_weights(model):
        llama.logits(model, ids)
        inputs.clear()
        llama.logits(model, ids)
        assert len({id(found()) for found in inputs if found() is not None}) <= 1
    assert all(found() is None for found in inputs)
