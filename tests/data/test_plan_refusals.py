"""Bad plans get a clear refusal: one line that names the setting and the way out."""

import pytest

from megatron_adapt.config import StageSettings
from megatron_adapt.data.plan import make_plan
from megatron_adapt.data.stage_plans import plan_stage, plan_stages
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import make_recipe, make_sources, make_stage
from tests.data.token_files import count_up, make_tokens

_SIZES = {"seq_length": 10, "global_batch_size": 4, "seed": 1}
_AVAILABLE = {"ja": 501, "en": 1001}
_RATIO = "give shares that sum to 1, or parts of at least 1 each"


# ---------------------------------------------------------------- settings of a stage


@pytest.mark.parametrize(
    "blend",
    [{"ja": 0.9, "en": 0.1}, {"ja": 9, "en": 1}, {"ja": 1.0}, {"ja": 7.5e9, "en": 1.0}, dict.fromkeys("abc", 1 / 3)],
)
def test_shares_that_sum_to_one_and_parts_are_accepted(blend):
    assert StageSettings(name="s", tokens=1, blend=blend).blend == blend


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": {"ja": 0.9, "en": 0.2}}, rf"blend: the sum is 1\.1; {_RATIO}"),
        ({"blend": {"ja": 9, "en": 0.1}}, rf"blend: the sum is 9\.1; {_RATIO}"),
        ({"blend": {"ja": 0.9}}, rf"blend: the sum is 0\.9; {_RATIO}"),
        ({"blend": {"ja": 0.333, "en": 0.333, "fr": 0.333}}, rf"blend: the sum is 0\.999; {_RATIO}"),
        ({"blend": {"ja": 9.0, "en": float("inf")}}, rf"blend: the sum is inf; {_RATIO}"),
        ({"blend": {"ja": 1.1, "en": -0.1}}, r"blend\.en -0\.1 is not positive; leave the language out"),
        ({"blend": {"ja": float("nan")}}, r"blend\.ja nan is not positive; leave the language out"),
        ({"blend": {"ja": 0.0, "en": 1.0}}, r"blend\.ja 0\.0 is not positive; leave the language out"),
        ({"weights": {"ja/web": 1.0}}, 'weights have no effect without within = "weight"; add it'),
        ({"within": "weight"}, 'within = "weight" needs weights; name the sources'),
        (
            {"within": "weight", "weights": {"ja/web": 0.5, "ja/wiki": 0.6, "en/web": 1.0}},
            rf"weights of ja: the sum is 1\.1; {_RATIO}",
        ),
        ({"within": "weight", "weights": {"ja/web": -1.0}}, r"weights\.ja/web -1\.0 is not positive; leave the source"),
        ({"within": "temperature", "temperature": 0.5}, r"temperature 0\.5 is no number from 1; 1 is by size, 5 is"),
        ({"within": "temperature", "temperature": float("nan")}, "temperature nan is no number from 1"),
        ({"temperature": 5.0}, 'temperature has no effect without within = "temperature"; add it'),
        ({"max_epochs": {"ja": 0.0}}, r"max_epochs\.ja 0\.0 is not positive; leave it out for no limit"),
        ({"max_epochs": {"ja": float("inf")}}, r"max_epochs\.ja inf is not positive; leave it out for no limit"),
        ({"shortfall": "cap"}, 'shortfall = "cap" has no effect without max_epochs; add them'),
    ],
)
def test_settings_that_make_no_plan_are_refused(changes, message):
    with pytest.raises(ConfigError, match=rf"^train\.stages full: {message}"):
        make_stage(**changes)


# ---------------------------------------------------------------- names of a recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": {"de": 1.0}}, r"blend\.de is not among old_languages and new_languages"),
        ({"blend": {"ja/web": 1.0}}, r"blend\.ja/web is not among old_languages and new_languages"),
        (
            {"within": "weight", "weights": {"ja/wep": 1.0}},
            r"weights\.ja/wep: the stage reads nothing of that name; use ja/wiki, ja/web, en",
        ),
        (
            {"within": "weight", "weights": {"en": 1.0}},
            "weights name no source of 'ja'; name those it shall read",
        ),
        (
            {"blend": {"ja": 1.0}, "max_epochs": {"en": 2.0}},
            r"max_epochs\.en: the stage reads nothing of that name; use ja, ja/wiki, ja/web",
        ),
        (
            {"within": "weight", "weights": {"ja/web": 1.0}, "max_epochs": {"ja/wiki": 2.0}},
            r"max_epochs\.ja/wiki: the stage reads nothing of that name; use ja, en, ja/web",
        ),
    ],
)
def test_names_that_a_stage_does_not_read_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"^train\.stages full: {message}"):
        make_recipe(tmp_path, make_stage(**changes))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (("ja", "ja/web", "en"), r"corpus\.ja: there is ja/web too; name both ja/SOURCE"),
        (("ja/web/a", "en"), r"corpus\.ja/web/a: no name of a corpus; write LANGUAGE, or LANGUAGE/SOURCE for one of"),
        (("ja/..", "en"), r"corpus\.ja/\.\.: no name of a corpus"),
        (("ja/", "en"), r"corpus\.ja/: no name of a corpus"),
        (("jp/web", "en", "ja"), r"corpus\.jp/web: 'jp' is not among old_languages and new_languages; add it or"),
        (("en",), r"corpus: no files for 'ja'; add corpus\.ja to the recipe"),
    ],
)
def test_names_of_corpora_that_mean_nothing_are_refused(sources, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make_recipe(tmp_path, corpus=dict.fromkeys(sources, ("a.jsonl",)))


# ---------------------------------------------------------------- a budget that does not fit the data


@pytest.mark.parametrize(
    ("shares", "available", "error", "message"),
    [
        ({}, _AVAILABLE, ConfigError, "blend: no sources; name at least one"),
        ({"ja": 0.0}, _AVAILABLE, ConfigError, r"blend\.ja: share 0\.0 is not positive; leave the source out"),
        ({"ja": float("nan")}, _AVAILABLE, ConfigError, r"blend\.ja: share nan is not positive"),
        ({"jp": 1.0}, _AVAILABLE, ConfigError, r"blend\.jp: unknown source \(known: ja, en\); correct the name"),
        ({"ja": 1.0}, {"ja": 0}, DataError, r"blend\.ja: the source holds no tokens; add text or leave it out"),
        ({"ja": 1.0}, {"ja": 10}, DataError, r"blend\.ja: 10 tokens are less than one window of 10 \+ 1; add text"),
    ],
)
def test_impossible_plan_is_refused(shares, available, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make_plan(shares, 1000, available, **_SIZES)


@pytest.mark.parametrize("change", [{"seq_length": 0}, {"global_batch_size": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ConfigError, match=f"blend: {next(iter(change))} 0 is below 1"):
        make_plan({"ja": 1}, 1000, _AVAILABLE, **(_SIZES | change))
    with pytest.raises(ConfigError, match="blend: tokens 0 is below 1"):
        make_plan({"ja": 1}, 0, _AVAILABLE, **_SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_epochs": {"ja": 1}},
            r"blend\.ja: the stage asks for 90 windows where max_epochs leaves 75; lower tokens, raise max_epochs, or "
            r'set shortfall = "redistribute" or "cap"',
        ),
        ({"max_epochs": {"ja/web": 0.5}}, r"blend\.ja/web: the stage asks for 30 windows where max_epochs leaves 12"),
        (
            {"max_epochs": {"ja": 0.5, "en": 0.5}, "shortfall": "redistribute"},
            "blend: max_epochs leaves 82 windows of all sources for a stage of 100; lower tokens or raise max_epochs",
        ),
        (
            {"max_epochs": {"ja/web": 0.04}, "shortfall": "cap"},
            r"blend\.ja/web: max_epochs leaves 1 windows, too few for one step of 4 at its share; raise max_epochs or",
        ),
    ],
)
def test_budget_over_max_epochs_is_refused_by_the_name_of_the_stage(changes, message, tmp_path):
    make_sources(tmp_path)
    with pytest.raises(ConfigError, match=rf"^train\.stages full: {message}"):
        plan_stage(make_recipe(tmp_path, make_stage(**changes)), "full")


def test_epochs_of_earlier_stages_count(tmp_path):
    make_sources(tmp_path)
    limited = make_stage(max_epochs={"ja": 1.5})
    assert plan_stage(make_recipe(tmp_path, limited), "full").windows == (60, 30, 10)
    after = make_recipe(tmp_path, make_stage(name="rows", tokens=400), limited)
    with pytest.raises(ConfigError, match=r"blend\.ja: the stage asks for 90 windows where max_epochs leaves 76;"):
        plan_stage(after, "full")


def test_recipe_without_tokens_or_stages_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"ja/wiki-train\.stage\.json: no such file"):
        plan_stages(make_recipe(tmp_path, make_stage()))
    with pytest.raises(ConfigError, match=r"train\.stages: the recipe has none"):
        plan_stages(make_recipe(tmp_path))


def test_source_of_less_than_a_window_is_refused_by_the_name_of_the_stage(tmp_path):
    make_sources(tmp_path)
    make_tokens(RunFolder(tmp_path).tokens("ja/web", "train"), count_up(0, 9))
    with pytest.raises(DataError, match=r"^train\.stages full: blend\.ja/web: 9 tokens are less than one window of"):
        plan_stage(make_recipe(tmp_path, make_stage()), "full")
