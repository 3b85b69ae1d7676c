"""Token distillation: what the teacher reads, the loss by hand, and that input rows of new tokens alone learn."""

from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.run_folder import describe_training
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.train.distill import compare_hidden_states, expand_windows, find_positions, spell_new_tokens
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step
from tests.helpers.runs import copy_run, train_stage
from tests.helpers.spawn import run_ranks
from tests.helpers.weights import make_weights
from tests.train.extended import NEW_IDS, make_extended_run

# ---------------------------------------------------------------- what the teacher reads

HAND = IdMap(base_vocab_size=6, vocab_size=9, moved={}, pieces={6: [1, 2], 7: [3, 4, 5], 8: []})


def spell(id_map=HAND, max_positions=99):
    return spell_new_tokens(id_map, layer=-1, max_positions=max_positions)


def test_teacher_reads_the_pieces_and_is_compared_at_the_last_one():
    ids_BT = np.array([[0, 6, 2, 7, 1], [0, 2, 8, 1, 6]])
    expanded_BS, last_BT = expand_windows(spell(), ids_BT, padding_id=9, multiple=5)
    assert expanded_BS.tolist() == [[0, 1, 2, 2, 3, 4, 5, 1, 9, 9], [0, 2, 8, 1, 1, 2, 9, 9, 9, 9]]
    assert last_BT.tolist() == [[0, 2, 3, 6, 7], [0, 1, 2, 3, 5]]
    cut_BS, last_BT = expand_windows(spell(max_positions=6), ids_BT, multiple=1)
    assert cut_BS.tolist() == [[0, 1, 2, 2, 3, 4], [0, 2, 8, 1, 1, 2]]
    assert last_BT.tolist() == [[0, 2, 3, 6, 7], [0, 1, 2, 3, 5]], "the last two of the first window are not there"


def test_positions_count_from_the_first_new_token_of_their_document_on():
    ids_BT = np.array([[0, 6, 2, 0, 1], [6, 2, 0, 7, 2], [0, 8, 1, 1, 6], [1, 1, 1, 1, 1]])
    spanning, apart = (find_positions(spell(), ids_BT, reset_at).astype(int).tolist() for reset_at in (None, 2))
    assert spanning == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert apart == [[0, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_pieces_are_found_where_a_new_tokenizer_has_put_them():
    renumbered = IdMap(base_vocab_size=3, vocab_size=4, moved={0: 2, 2: 0, 3: 1}, pieces={1: [0, 1, 0]})
    assert expand_windows(spell(renumbered), np.array([[0, 1, 3]]), multiple=1)[0].tolist() == [[0, 2, 3, 2, 3]]


def test_new_tokens_of_dropped_pieces_are_refused():
    dropped = IdMap(base_vocab_size=9, vocab_size=4, moved={}, pieces={2: [0, 1], 3: [0, 7]})
    with pytest.raises(ConfigError, match=r"1 of 2 new tokens are spelt by old tokens .* \(token 3: old id 7\), so"):
        spell(dropped)


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=5),
    st.data(),
    st.integers(1, 30),
    st.integers(1, 7),
)
def test_expanding_equals_spelling_token_after_token(spelt, data, max_positions, multiple):
    pieces = dict(enumerate(spelt, start=4))
    id_map = IdMap(base_vocab_size=4, vocab_size=4 + len(pieces), moved={}, pieces=pieces)
    row = st.lists(st.integers(0, id_map.vocab_size - 1), min_size=6, max_size=6)
    ids_BT = np.array(data.draw(st.lists(row, min_size=1, max_size=3)))
    expanded_BS, last_BT = expand_windows(spell(id_map, max_positions), ids_BT, padding_id=99, multiple=multiple)
    assert expanded_BS.shape[1] % multiple == 0
    for ids, expanded, last in zip(ids_BT.tolist(), expanded_BS.tolist(), last_BT.tolist(), strict=True):
        parts = [pieces.get(index) or [index] for index in ids]
        assert np.cumsum([len(part) for part in parts]).tolist() == [place + 1 for place in last]
        whole = list(chain(*parts))[:max_positions]
        assert expanded[: len(whole)] == whole
        assert set(expanded[len(whole) :]) <= {99}


# ---------------------------------------------------------------- the loss

T, EOD, ROWS, PADDED, NUM_STEPS = 16, 1, 300, 312, 3
PIECES = {2: [5, 9], 7: [10, 11, 12, 13], 150: [200], 155: [20, 20], 156: [21, 22, 23], 157: [99, 5], 299: [31, 30]}
"""New ids on both sides of the cut of two tensor-parallel ranks, which lies before row 156."""
SCATTERED = IdMap(base_vocab_size=ROWS, vocab_size=ROWS, moved={}, pieces=PIECES)
STAGE = StageSettings(
    name="one", tokens=1, blend={"en": 1.0}, trainable="new_rows", objective="token_distillation", lr=1e-2,
    lr_warmup_fraction=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Megatron checkpoints of a tiny model, by whether its head is tied."""
    return make_weights(tmp_path_factory.mktemp("weights"), vocab_pad_multiple=PADDED)


def make_windows():
    """Windows [4, T + 1]: some tokens are new, some end documents, the last window has none of either."""
    draw = np.random.default_rng(0)
    windows = draw.integers(2, ROWS, (4, T + 1))
    is_new = draw.random(windows.shape) < 0.3
    windows[is_new] = draw.choice(list(PIECES), is_new.sum())
    windows[draw.random(windows.shape) < 0.1] = EOD
    windows[3] = np.arange(40, 40 + T + 1)
    return windows


def make_trainer(weights, layout, train, num_steps=NUM_STEPS):
    description = read_description(weights)
    model = build_model(description.shape, padded_vocab_size=PADDED, layout=layout, seq_length=T, bf16=train.bf16)
    freeze_rest(model, STAGE.trainable, head=False)
    trainer = build_trainer([model], train, STAGE, num_steps, np.array(list(PIECES)))
    load_weights(trainer.bare_models, weights)
    trainer.optimizer.reload_model_params()
    return trainer


def compute_by_hand(model, windows, *, layer, reset_at):
    """Return the squared error behind ``layer`` at every position that counts, each document in passes of its own."""
    found = []

    def read(ids):
        states = []
        modules = [*model.decoder.layers, model.decoder.final_layernorm]
        hook = modules[layer if layer == -1 else layer - 1].register_forward_hook(
            lambda _, __, output: states.append(output if layer == -1 else output[0])
        )
        with torch.no_grad():
            model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        hook.remove()
        return states[0][:, 0]

    for window in windows[:, :-1].tolist():
        ends = [place + 1 for place in range(T - 1) if window[place] == reset_at]
        for start, stop in zip([0, *ends], [*ends, T], strict=True):
            document = window[start:stop]
            parts = [PIECES.get(index, [index]) for index in document]
            teacher, student = read(list(chain(*parts))), read(document)
            last = np.cumsum([len(part) for part in parts]) - 1
            error = (student - teacher[last]).square().mean(-1)
            seen = np.maximum.accumulate([index in PIECES for index in document])
            found += error[torch.tensor(seen)].tolist()
    return found


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("reset_at", [None, EOD])
def test_loss_is_the_mean_squared_error_of_both_readings_from_the_first_new_token_on(weights, layer, reset_at):
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights[False], Layout(), TrainSettings(bf16=False))
        distillation = spell_new_tokens(SCATTERED, layer=layer, max_positions=128)
        expected = compute_by_hand(trainer.bare_models[0], make_windows(), layer=layer, reset_at=reset_at)
        report = train_step(trainer, make_windows(), 2, reset_at=reset_at, distillation=distillation)
        assert report.loss == pytest.approx(np.mean(expected), rel=1e-5)
        assert report.num_left_out == 0
        assert report.grad_norm > 0
        # The model itself is whole again.
        ids = torch.zeros(1, 2, dtype=torch.long)
        assert trainer.bare_models[0](ids, torch.arange(2)[None], None).shape[-1] == PADDED


def test_what_the_teacher_cannot_reach_is_left_out_and_counted(weights):
    windows, limit = make_windows(), 14
    plans = [spell_new_tokens(SCATTERED, layer=-1, max_positions=size) for size in (128, limit)]
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights[False], Layout(), TrainSettings(bf16=False))
        whole, cut = (compare_hidden_states(plan, trainer.bare_models[0], windows[:, :-1], None) for plan in plans)
        report = train_step(trainer, windows, 1, distillation=plans[1])
    assert whole[1].sum() == cut[1].sum() + cut[2].sum()
    assert not whole[2].any()
    assert report.num_left_out == cut[2].sum() > 0
    assert report.loss == pytest.approx(float(whole[0][torch.from_numpy(cut[1])].mean()), rel=1e-5)


def test_a_batch_without_new_tokens_has_a_loss_of_zero_and_moves_nothing(weights):
    windows = np.tile(np.arange(40, 40 + T + 1), (2, 1))
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights[False], Layout(), TrainSettings(bf16=False))
        before = [parameter.detach().clone() for parameter in trainer.bare_models[0].parameters()]
        report = train_step(trainer, windows, 2, distillation=spell_new_tokens(SCATTERED, layer=-1, max_positions=99))
        assert (report.loss, report.grad_norm) == (0.0, 0.0)
        assert all(map(torch.equal, before, trainer.bare_models[0].parameters()))


def test_a_token_of_one_piece_learns_to_be_read_as_that_piece(weights):
    """The one case with an exact answer, the row of the piece: from rows beside it the loss goes to zero."""
    pieces, windows = {2: [5], 7: [10], 150: [200]}, make_windows()
    windows[np.isin(windows, [index for index in PIECES if index not in pieces])] = 7
    windows[0, :3] = list(pieces)
    one_by_one = IdMap(base_vocab_size=ROWS, vocab_size=ROWS, moved={}, pieces=pieces)
    distillation = spell_new_tokens(one_by_one, layer=-1, max_positions=128)
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights[False], Layout(), TrainSettings(bf16=False), num_steps=200)
        matrix = trainer.bare_models[0].embedding.word_embeddings.weight.detach()
        noise = torch.randn(len(pieces), matrix.shape[1], generator=torch.Generator().manual_seed(0))
        matrix[list(pieces)] = matrix[[5, 10, 200]] + 0.15 * noise
        trainer.optimizer.reload_model_params()
        reports = [train_step(trainer, windows, 4, distillation=distillation) for _ in range(200)]
    assert reports[-1].loss < 0.01 * reports[0].loss


CASES = {
    "tp2": (Layout(tensor_model_parallel_size=2), {}),
    "tp2-sp": (Layout(tensor_model_parallel_size=2, sequence_parallel=True), {}),
    "dp2": (Layout(), {}),
    "tp2-bf16": (Layout(tensor_model_parallel_size=2), {"bf16": True}),
}


def run_steps(weights, layout, settings, layer):
    """Return loss and norm of some steps, the ids whose input rows changed by a bit, and what else changed."""
    train = TrainSettings(**{"bf16": False, **settings})
    trainer = make_trainer(weights, layout, train)
    distillation = spell_new_tokens(SCATTERED, layer=layer, max_positions=128)
    before = {name: value.detach().clone() for name, value in trainer.bare_models[0].named_parameters()}
    step = partial(train_step, trainer, make_windows(), 2, reset_at=EOD, distillation=distillation)
    reports = [step() for _ in range(NUM_STEPS)]
    after = dict(trainer.bare_models[0].named_parameters())
    kind = torch.int16 if train.bf16 else torch.int32
    changed = {name: value.detach().view(kind) != before[name].view(kind) for name, value in after.items()}
    rows = changed.pop("embedding.word_embeddings.weight").any(-1)
    first = parallel_state.get_tensor_model_parallel_rank() * len(rows)
    numbers = [number for report in reports for number in (report.loss, report.grad_norm)]
    return numbers, {int(row) + first for row in rows.nonzero()}, [name for name, bits in changed.items() if bits.any()]


def _run_cases(weights):
    """Go through the layouts in one process group; a second one in the same process would hang."""
    found = {}
    with start_engine(Layout(tensor_model_parallel_size=2), seed=1):
        for name, (layout, settings) in CASES.items():
            # Once a layout: the threads of the groups before live on.
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            for tied, folder in weights.items():
                # Also a layer before the last one.
                found[tied, name] = run_steps(folder, layout, settings, 1 if tied else -1)
    return found


def test_input_rows_of_new_tokens_alone_change_and_the_losses_are_the_same_under_every_layout(weights):
    present = set(make_windows()[:, :-1].flatten().tolist()) & set(PIECES)
    assert {index < 156 for index in present} == {True, False}
    expected = {}
    with start_engine(Layout(), seed=1):
        for tied, folder in weights.items():
            numbers, rows, others = run_steps(folder, Layout(), {}, 1 if tied else -1)
            assert (rows, others) == (present, [])
            assert numbers[-2] < numbers[0]
            expected[tied] = numbers
    ranks = run_ranks(_run_cases, 2, weights)
    for tied, name in ranks[0]:
        found = [rank[tied, name] for rank in ranks]
        assert set.union(*(rows for _, rows, _ in found)) == present, name
        for numbers, _, others in found:
            assert others == [], name
            assert numbers == pytest.approx(expected[tied], rel=5e-2 if "bf16" in name else 1e-5), name


# ---------------------------------------------------------------- a stage of a recipe

LONGER = ("--train.stages.0.tokens", "5760", "--train.save-interval", "100")
DISTIL = 'trainable = "new_rows"\nobjective = "token_distillation"'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that stopped in the middle of a stage of token distillation."""
    recipe = make_extended_run(tmp_path_factory.mktemp("run"), stage=DISTIL)
    train_stage(recipe, "first", *LONGER, "--train.stop-after-steps", "3")
    return recipe


def test_stage_learns_and_resumes_exactly_and_its_rows_of_metrics_name_the_loss(run, tmp_path):
    straight, resumed = (
        copy_run(run, tmp_path / "straight", trained=True),
        copy_run(run, tmp_path / "resumed", trained=True),
    )
    root = straight.parent / "run"
    (root / "checkpoints").rename(root / "put_aside")
    expected, rows = (train_stage(it, "first", *LONGER) for it in (straight, resumed))
    for name in ("loss", "grad_norm", "valid_bits_per_byte", "tokens", "objective", "positions_left_out"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name
    assert {row["objective"] for row in rows[1:]} == {"token_distillation"}
    # A squared error is no loss of next tokens, and runs no head.
    assert not any({"bits_per_byte", "mfu", "tflops_per_device"} & set(row) for row in rows)
    losses = [row["loss"] for row in rows[1:]]
    assert losses[-1] < 0.75 * losses[0]
    before, after = (DistReader(find_checkpoint(root / name)) for name in ("megatron", "checkpoints/first"))
    for key in before.keys:
        changed = (before.read(key) != after.read(key)).flatten(1 if before.shape(key)[1:] else 0).any(-1)
        rows = changed.nonzero().flatten().tolist() if key == "embedding.word_embeddings.weight" else []
        assert rows == (NEW_IDS[1:] if rows else []), key
        assert bool(rows) == bool(changed.any()), key
    assert not [key for key in after.keys if key.startswith("optimizer") and "output_layer" in key]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            ["--train.pipeline-model-parallel-size", "2"],
            ConfigError,
            r"stages first: token_distillation: does not run at pipeline_model_parallel_size 2; launch this stage with",
        ),
        (
            ["--train.stages.0.distillation-layer", "3"],
            ConfigError,
            r"the model has 2 layers, distillation_layer is 3; use -1",
        ),
        (["--train.stages.0.distillation-layer", "1"], CheckpointError, r"distillation_layer -1, now it is 1; restore"),
        (
            ["--train.stages.0.objective", "language_modeling"],
            CheckpointError,
            r"saved with objective token_distillation, now it is language_modeling; restore",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_running_stage_are_refused(run, flags, error, message):
    with pytest.raises(error, match=message):
        train_stage(run, "first", *LONGER, *flags)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "token_distillation", "trainable": "all"},
            r'objective = "token_distillation" trains rows of new tokens alone, trainable is "all"; set it',
        ),
        (
            {"distillation_layer": 4},
            r'distillation_layer has no effect without objective = "token_distillation"; add it',
        ),
        (
            {"objective": "token_distillation", "trainable": "new_rows", "distillation_layer": 0},
            r"distillation_layer 0 is no layer; use 1 or more, or -1 for the last",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"train\.stages warm: {message}"):
        StageSettings(**{"name": "warm", "tokens": 1, "blend": {"en": 1.0}, **settings})


def test_a_stage_that_was_finished_before_there_were_objectives_is_still_the_same():
    plain = StageSettings(name="warm", tokens=1, blend={"en": 1.0}, trainable="new_rows")
    described = [describe_training(stage, TrainSettings())["stage"] for stage in (plain, STAGE)]
    assert not {"objective", "distillation_layer"} & set(described[0])
    assert described[1]["objective"] == "token_distillation"
