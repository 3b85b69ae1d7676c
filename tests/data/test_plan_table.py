import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_adapt.data.plan import make_plan, read_plan
from megatron_adapt.data.plan_table import describe_plan, plot_plan, show_plans
from megatron_adapt.data.stage_plans import plan_stages
from megatron_adapt.files import write_json
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import make_recipe, make_sources, make_stage

_SIZES = {"seq_length": 10, "global_batch_size": 4, "seed": 1}
_AVAILABLE = {"ja": 501, "en": 1001}
_TOOL = Path(__file__).parents[2] / "tools" / "plan_blend.py"


def _describe(*args, **changes):
    return describe_plan(make_plan(*args, **(_SIZES | changes))).splitlines()


def test_table_shows_every_source_and_the_sum():
    *table, steps = _describe({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE)
    assert table == [
        "source  windows  tokens      share  available  epochs  repeats",
        "ja           90     900   90.0000%        500   1.800      400",
        "en           10     100   10.0000%      1,000   0.100        0",
        "all         100   1,000  100.0000%                         400",
    ]
    assert steps.startswith("25 steps of 4 windows of 10 tokens, plan ")


def test_table_sums_the_sources_of_a_language():
    available = {"ja/wiki": 501, "ja/web": 251, "en": 1001}
    *table, _ = _describe({"ja/wiki": 0.6, "ja/web": 0.3, "en": 0.1}, 1000, available)
    assert [line.split("  ")[0] for line in table] == ["source", "ja/wiki", "ja/web", "ja, all", "en", "all"]
    assert table[3].split() == ["ja,", "all", "90", "900", "90.0000%", "750", "1.200", "150"]


def test_table_shows_what_a_stage_continues_and_what_bears_no_loss():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES, first={"ja": 60})
    table = describe_plan(replace(plan, loss_tokens=(800, 100))).splitlines()
    assert table[0] == "source  windows  tokens  loss tokens      share  available  epochs  up to  repeats"
    assert table[1].split() == ["ja", "90", "900", "800", "90.0000%", "500", "1.800", "3.000", "900"]


@pytest.mark.parametrize(
    ("shares", "tokens", "changes", "remark"),
    [
        ({"ja": 0.999, "en": 0.001}, 40, {}, "en: never read, its share is less than a window; raise it, or leave the"),
        (
            {"ja": 0.9, "en": 0.1},
            1000,
            {"first": {"ja": 60}, "max_epochs": {"ja": 1}, "shortfall": "redistribute"},
            "ja: never read, max_epochs leaves nothing of it; raise it, or leave the source out",
        ),
        (
            {"ja": 0.9, "en": 0.1},
            1000,
            {"max_epochs": {"ja": 1}, "shortfall": "cap"},
            "max_epochs shortens the stage from 1,000 tokens",
        ),
    ],
)
def test_table_remarks_what_is_not_as_asked(shares, tokens, changes, remark):
    assert [line for line in _describe(shares, tokens, _AVAILABLE, **changes) if line.startswith(remark)]


def test_asked_shares_are_shown_where_max_epochs_changed_them():
    changes = {"max_epochs": {"ja": 1}, "shortfall": "redistribute"}
    header, ja, *_ = _describe({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **changes)
    assert header.split()[3:5] == ["share", "asked"]
    assert ja.split()[3:5] == ["50.0000%", "90.0000%"]


def test_picture_is_drawn_also_of_very_many_sources(tmp_path):
    available = {f"ja/{at:03}": 1000 + at for at in range(100)}
    plan = make_plan(available, 100_000, available, **_SIZES)
    plot_plan(tmp_path / "plan.png", plan, "stage full")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plans_of_all_stages_are_printed_and_written(tmp_path, capsys):
    make_sources(tmp_path)
    recipe = make_recipe(tmp_path, make_stage(name="rows", blend={"ja": 1.0}), make_stage())
    show_plans(recipe)
    printed = capsys.readouterr().out
    plans, folder = plan_stages(recipe), RunFolder(tmp_path).plans
    for name, plan in plans.items():
        assert f"stage {name}\n{describe_plan(plan)}\n" in printed
        assert read_plan(folder / f"{name}.json") == plan
        assert (folder / f"{name}.png").is_file()


def test_tool_plans_without_torch(tmp_path):
    make_sources(tmp_path)
    write_json(tmp_path / "recipe.json", make_recipe(tmp_path, make_stage()))
    command = [sys.executable, "-X", "importtime", str(_TOOL), "--recipe", str(tmp_path / "recipe.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "25 steps of 4 windows of 10 tokens" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "matplotlib" in imported
    assert not imported & {"torch", "megatron", "transformers"}
