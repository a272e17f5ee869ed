"""The exact suffix run: from any layer and any position, for any rows, it is the full run."""

import pytest
import torch

from mechinterp import Apply, Site, Steer, Zero
from mechinterp.hooked import suffix
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.suffix import Levers, Read
from tests.families import FAMILIES, full_logits, model, pairs


def everything(task):
    """Reads the whole vocabulary at the last two positions."""
    n_pos = task.clean.n_pos
    return Read(torch.tensor([[n_pos - 2, n_pos - 1]] * len(task)))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_each_layer_and_start(family, padded):
    of = model(family)
    task = pairs(of, padded)
    want = everything(task).gather(full_logits(of, task.clean, []))
    recording = suffix.record(of, task.clean)
    assert recording.levers == Levers(True, True, True)
    for layer in range(of.n_layers):
        for start in range(task.clean.n_pos - 1):
            rows = Rows(task.clean, torch.arange(len(task)), start)
            got = recording.logits(layer, rows, everything(task), {})
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, msg=f"layer {layer}, start {start}")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_in_the_suffix_is_the_edit_in_the_full_run(family):
    """Reversed axes at the positions that are run; the whole vocabulary is compared."""
    of = model(family)
    task = pairs(of, True)
    recording = suffix.record(of, task.clean)
    read = everything(task)
    for layer, name, start in [(0, "q", 5), (1, "v", 4), (1, "mlp_out", 6), (2, "resid_pre", 0), (1, "k", 5)]:
        site = Site(name, layer)

        def from_start(x, hook, start=start):
            x = x.clone()
            x[:, start:] = x[:, start:].flip(-1)
            return x

        want = read.gather(full_logits(of, task.clean, [(site.hook_name, from_start)]))
        rows = Rows(task.clean, torch.arange(len(task)), start)
        got = recording.logits(layer, rows, read, {site.hook_name: lambda x, rows: x.flip(-1)})
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4, msg=str(site))
        assert (want - read.gather(full_logits(of, task.clean, []))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_any_order_and_number(family):
    of = model(family)
    task = pairs(of, True)
    recording = suffix.record(of, task.clean)
    want = everything(task).gather(full_logits(of, task.clean, []))
    for index in ([3, 0], [1, 1, 2, 0, 3, 3, 1], [2]):
        got = recording.logits(1, Rows(task.clean, torch.tensor(index), 4), everything(task), {})
        torch.testing.assert_close(got, want[index], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_of_some_prompts_is_part_of_that_of_all(family):
    """What is recorded in parts (as memory allows) is counted within its part."""
    of = model(family)
    task = pairs(of, True)
    site = Site("z", 1)
    whole = suffix.record(of, task.clean, [site])
    part = suffix.record(of, task.clean, [site], index=torch.tensor([2, 3]))
    torch.testing.assert_close(
        part.activations[site.hook_name], whole.activations[site.hook_name][2:], atol=1e-5, rtol=1e-5
    )
    for index, start in [([2, 3], 0), ([3, 2, 3], 4)]:
        rows = Rows(task.clean, torch.tensor(index), start)
        got, want = (r.logits(1, rows, everything(task), {}) for r in (part, whole))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        part.base_logits(everything(task)), whole.base_logits(everything(task))[2:], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_are_columns(family):
    of = model(family)
    task = pairs(of, False)
    columns = torch.tensor([[[3, 5, 3], [0, of.d_vocab - 1, 2]]] * len(task))
    read = Read(everything(task).positions, columns)
    got = suffix.record(of, task.clean).base_logits(read)
    want = everything(task).gather(full_logits(of, task.clean, [])).gather(-1, columns)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_a_suffix_really_skips(monkeypatch):
    """Neither the blocks before the layer nor the positions before the start are run again."""
    of = model("llama")
    task = pairs(of, False)
    recording = suffix.record(of, task.clean)
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda block, args, at=at: ran.append((at, tuple(args[0].shape))))
        for at, block in enumerate(of.bridge.blocks)
    ]
    try:
        recording.logits(2, Rows(task.clean, torch.tensor([0, 3]), 5), everything(task), {})
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [(2, (2, task.clean.n_pos - 5, of.d_model))]


def test_a_recording_does_not_change_with_use():
    of = model("llama")
    task = pairs(of, True)
    recording = suffix.record(of, task.clean)
    first = recording.logits(0, Rows(task.clean, torch.arange(4), 3), everything(task), {})
    recording.logits(
        0, Rows(task.clean, torch.arange(4), 3), everything(task), {Site("v", 0).hook_name: lambda x, rows: 9 * x}
    )
    assert torch.equal(first, recording.logits(0, Rows(task.clean, torch.arange(4), 3), everything(task), {}))


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_interventions_in_force_are_replayed(family):
    of = model(family)
    task = pairs(of, True)
    ones = [
        Zero(Site("z", 1, head=2)),
        Steer(Site("k_input", 1), torch.linspace(-1, 1, of.d_model)),
        Apply(Site("resid_pre", 0), lambda x, site: 0.5 * x, to=Site("mlp_out", 2)),
        Steer(Site("embed"), torch.ones(of.d_model)),
    ]
    with of.intervene(*ones):
        want = everything(task).gather(of(task.clean))
        recording = suffix.record(of, task.clean)
        for layer in range(of.n_layers):
            got = recording.logits(layer, Rows(task.clean, torch.arange(4)), everything(task), {})
            torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


def test_interventions_that_cross_layers_one_after_another():
    """Restarting where one is read may lie between where another is read and written."""
    of = model("gemma2")
    task = pairs(of, True)
    hops = [
        (Site("resid_pre", 0), Site("mlp_out", 1)),
        (Site("z", 1), Site("z", 2)),
        (Site("mlp_post", 2), Site("mlp_post", 3)),
    ]
    with of.intervene(*[Apply(reads, lambda x, site: 0.5 * x.flip(-1), to=writes) for reads, writes in hops]):
        want = everything(task).gather(of(task.clean))
        recording = suffix.record(of, task.clean)
        for layer in range(of.n_layers):
            got = recording.logits(layer, Rows(task.clean, torch.arange(4)), everything(task), {})
            torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-4)


def test_resid_mid_edits_carry_into_the_suffix():
    """An edit between attention and MLP reaches the skip connection, in a suffix run as in a full one."""
    of = model("gpt2")
    task = pairs(of, False)
    recording = suffix.record(of, task.clean)
    got = recording.logits(
        1, Rows.all(task.clean), everything(task), {Site("resid_mid", 1).hook_name: lambda x, rows: x + 1.5}
    )
    want = full_logits(of, task.clean, [("blocks.1.hook_attn_out", lambda x, hook: x + 1.5)])
    torch.testing.assert_close(got, everything(task).gather(want), atol=5e-5, rtol=1e-4)
