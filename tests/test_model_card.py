"""The model card: valid metadata, numbers that are the files' own, nothing of a run read as markup, nothing invented."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from common.sensors import Alert
from common.store import paths
from common.store.audit import AuditReport, audit
from common.store.run_store import RunStore
from deploy.config import load_config
from deploy.model_card.card import CARD, CONFIG, card_files, make_card, render_card
from deploy.model_card.cost import POINT
from deploy.model_card.facts import CardFacts, CardRequest, read_facts
from deploy.model_card.markdown import block, code, plain
from deploy.model_card.pictures import GRID
from deploy.model_card.sources import base_facts
from deploy.options import run_config_of
from tests.export_runs import COMMIT, PROMPT, SCORER, bare_run, card_config, card_run, trained_state
from tests.report_runs import metrics

REQUEST = CardRequest(version=6, snapshot="ema", fmt="diffusers", digest="d" * 64)
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@pytest.fixture(scope="module")
def run(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    config = card_config(tiny_sd3_dir)
    return card_run(tmp_path_factory.mktemp("runs") / "whole", config, trained_state(config.model))


@pytest.fixture(scope="module")
def facts(run: RunStore) -> CardFacts:
    return read_facts(run, run_config_of(run), REQUEST)


@pytest.fixture(scope="module")
def bare(tiny_sd3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> CardFacts:
    config = card_config(tiny_sd3_dir)
    store = bare_run(tmp_path_factory.mktemp("runs") / "bare", config, trained_state(config.model))
    return read_facts(store, run_config_of(store), replace(REQUEST, version=1))


def parsed(card: str) -> list[Token]:
    """The body's Markdown, as any reader of CommonMark with tables takes it."""
    return PARSER.parse(ModelCard(card).text)


def section(card: str, title: str) -> str:
    """One section's source."""
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def cells(text: str, task: str) -> list[str]:
    """The table line of a task."""
    (line,) = [line for line in text.splitlines() if line.startswith("|") and f"| {task} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_metadata_load_as_a_model_card_and_keep_to_the_hubs_rules(facts: CardFacts, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(render_card(facts), encoding="utf-8")
    data = ModelCard.load(tmp_path / CARD).data
    told = data.to_dict()
    assert (told["pipeline_tag"], told["library_name"], told["base_model_relation"]) == ("text-to-image", "diffusers", "adapter")
    assert HUB_ID.fullmatch(told["base_model"])
    assert (told["license"], told["license_name"]) == ("other", "not-recorded")  # the small random model has no card of its own
    assert {"lora", "flowfleet", "nft"} <= set(told["tags"])
    assert len(set(told["tags"])) == len(told["tags"])
    assert told["model-index"] == eval_results_to_model_index("tiny-geneval", data.eval_results)
    for result in told["model-index"][0]["results"]:
        assert result["task"]["type"] == "text-to-image"
        assert {"type", "name"} <= result["dataset"].keys()
        assert all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"])


def test_the_numbers_are_those_of_the_result_files(run: RunStore, facts: CardFacts) -> None:
    card = render_card(facts)
    result = json.loads(run.read(paths.result_path(paths.eval_directory(6, "ema", "0123abcd"))))["rewards"]["geneval_strict"]
    assert result["mean"] == 0.8125  # (.875 + .75) / 2
    found = {one.dataset_config: one.metric_value for one in ModelCard(card).data.eval_results}
    assert found == {"mean over tasks": result["mean"], **{tag: task["mean"] for tag, task in result["tasks"].items()}}
    text = section(card, "Evaluation")
    *_, base, tuned, change = cells(text, "mean over tasks")
    assert (base[:6], tuned[:6], change[:7]) == ("0.2500", "0.8125", "+0.5625")
    assert cells(text, "colors")[2:4] == ["4", "4"]
    *_, base, tuned, change = cells(text, "counting")
    assert base == "0.0000 (0.0000 to 0.0000)"
    assert tuned == "0.7500 (0.5000 to 1.0000)"  # prompts of 1 and .5: resampling gives .5, .75 and 1, a quarter of the time each end
    assert change == "+0.7500 (+0.5000 to +1.0000)"
    assert "protocol 0123abcd" in text
    assert "seed 20250505 by prompt id" in text


def test_what_a_version_cost_is_the_sum_over_its_metrics_files(facts: CardFacts) -> None:
    seconds = [sum(metrics(1, 6)["seconds"].values()), sum(metrics(4, 6, 2)["seconds"].values())]
    expected_s = seconds[0] + 18.0 + seconds[1] + 12.0  # updates end 6 s apart: 1 to 4 in the first start, 4 to 6 in the second
    assert facts.cost.hours * 3600 == pytest.approx(expected_s, rel=1e-6)  # wall clocks are near 1.7e9 in float64: 1e-7 s
    assert facts.cost.core_hours == pytest.approx(2 * facts.cost.hours)
    assert [start.num_updates for start in facts.cost.starts] == [4, 3]
    assert (facts.cost.num_updates, facts.cost.images_trained) == (6, 6 * 192)  # update 4 once
    assert facts.cost.images_evaluated == 3 * 6
    (price,) = facts.cost.prices
    assert price.images == pytest.approx(6 * 192 * POINT / 0.5625)
    assert price.hours == pytest.approx(expected_s / 3600 * POINT / 0.5625)
    text = section(render_card(facts), "Hardware, hours and cost")
    assert "geneval_strict rose by 0.5625: 20 images" in text  # 1152 x .01 / .5625 = 20.48
    assert "6 learner updates, 1152 images sampled and trained on, 18 images of frozen evaluations" in text
    assert "2 rollout workers, 1 learner rank, 2 reward servers" in text
    assert "a processor, 2 cores, 8 GiB" in text


def test_prompts_with_markup_are_shown_and_never_obeyed(facts: CardFacts) -> None:
    card = render_card(facts)
    rows = facts.samples.rows if facts.samples else ()
    assert len(rows) == 6
    shown = [token.content for token in parsed(card) if token.type == "inline"]
    html = PARSER.render(ModelCard(card).text)
    assert "<script" not in html.lower()
    assert "example.org" not in re.sub(r">[^<]*<", "", html)  # in the text of a cell, in no attribute
    first = PARSER.renderInline(plain(PROMPT))
    assert not any(mark in first for mark in ("<strong>", "<a ", "<em>"))
    assert first.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == PROMPT
    told = [plain(row.prompt).replace("\\|", "|") for row in rows]  # the table took its own escape away
    assert [sum(content == text for content in shown) for text in told] == [1] * len(rows)  # each stands whole in one cell


@pytest.mark.parametrize(
    "text", ["1. one", "- two", "+ three", "===", "# four", "a\n\n## b", "`c`", "www.d.org", "@e", ":f:", "_g_ h_i", "&lt;", "[x](y)"]
)
def test_a_text_shows_itself_on_one_line(text: str) -> None:
    tokens = PARSER.parse(plain(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert [child.type for child in tokens[1].children or []] in (["text"], ["text", "text_special", "text"]) or all(
        child.type in ("text", "text_special") for child in tokens[1].children or []
    )
    assert "".join(child.content for child in tokens[1].children or []) == " ".join(text.split())


@pytest.mark.parametrize("text", ["plain", "a `tick`", "``two``", "~~~\n```\n````\nend"])
def test_code_cannot_be_ended_from_inside(text: str) -> None:
    (fence,) = PARSER.parse(block(text, "json"))
    assert (fence.type, fence.content) == ("fence", text + "\n")
    (span,) = [token for token in PARSER.parse(code(text))[1].children or [] if token.type == "code_inline"]
    assert span.content == " ".join(text.split())


def test_the_whole_configuration_is_in_the_card_and_trains_again_from_its_file(facts: CardFacts, tmp_path: Path) -> None:
    blocks = [token for token in parsed(render_card(facts)) if token.type == "fence"]
    (shown,) = [json.loads(token.content) for token in blocks if token.info == "json"]
    assert shown == json.loads(json.dumps(facts.shown_config))
    files = card_files(facts)
    (tmp_path / CONFIG).write_bytes(files[CONFIG])
    again = load_config(str(tmp_path / CONFIG), [])
    assert again == facts.config
    assert all(path in render_card(facts) for path in files if path not in (CARD, CONFIG))  # every picture is shown


def test_the_pictures_are_small_and_stand_on_white(facts: CardFacts) -> None:
    assert {"train-rewards", "frozen-evaluation-geneval-strict"} <= {curve.path[10:-4] for curve in facts.curves}
    for curve in facts.curves:
        root = ElementTree.fromstring(curve.content)
        assert root[0].tag.endswith("rect")
        assert root[0].attrib["fill"] == "#ffffff"
    assert facts.samples is not None
    with Image.open(BytesIO(facts.samples.content)) as grid:
        assert grid.size == (6 * 128 + 5 * 4, 2 * (128 + 14) + 4)  # three pairs a line, a caption under each
    assert len(facts.samples.content) < 1_000_000
    assert GRID in render_card(facts)


def test_rewards_stand_with_version_license_and_meaning_and_user_code_without(facts: CardFacts) -> None:
    line = next(line for line in section(render_card(facts), "Rewards").splitlines() if line.startswith("| geneval_strict "))
    assert f"| train | 0.5 | {SCORER} |" in line
    assert "definition MIT" in line
    reward = facts.rewards[0]
    own = replace(reward, config=reward.config.model_copy(update={"name": "my_code:judge"}), card=None, versions=())
    text = section(render_card(replace(facts, rewards=(own,))), "Rewards")
    assert "| my_code\\:judge | train | 0.5 | not recorded | not recorded | not recorded | user code" in text


def test_what_a_run_does_not_tell_is_not_recorded_and_not_invented(bare: CardFacts) -> None:
    card = render_card(bare)
    assert "model-index" not in ModelCard(card).data.to_dict()
    assert "- Frozen evaluation: not recorded." in section(card, "What it is")
    for title in ("Evaluation", "Samples", "Curves", "Sensors"):
        assert "ot recorded" in section(card, title)
    assert "commit not recorded" in section(card, "Reproduce")
    assert "Package versions: not recorded" in section(card, "Reproduce")
    text = section(card, "Hardware, hours and cost")
    assert "| 0 | 0.000 |" in text
    assert "not computed" in text
    assert not re.search(r"\b(None|nan|Undefined)\b", re.sub(r"```.*?```", "", card, flags=re.DOTALL))


def test_weights_that_were_not_evaluated_borrow_no_result(run: RunStore, facts: CardFacts) -> None:
    early = read_facts(run, facts.config, replace(REQUEST, version=5))
    for found in (early, replace(facts, request=replace(REQUEST, snapshot="live"))):
        card, request = render_card(found), found.request
        assert "model-index" not in ModelCard(card).data.to_dict()
        assert "No evaluation of these very weights" in card
        assert f"version {request.version} ({request.snapshot}) was not evaluated" in section(card, "Evaluation")
    assert early.cost.prices == ()
    assert early.evaluation is not None
    assert early.evaluation.version == 3  # nothing later speaks for version 5
    assert max(record.update for record in early.history.updates) == 5


def test_an_earlier_version_that_scored_higher_is_named(facts: CardFacts) -> None:
    low = {"geneval_strict": replace(facts.history.evaluations[-1].rewards["geneval_strict"], mean=0.6)}
    worse = replace(facts.history.evaluations[-1], rewards=low)
    assert facts.better_versions == []
    (found,) = replace(facts, evaluation=worse).better_versions
    assert (found.version, found.mean) == (6, 0.8125)


def test_the_trees_changes_the_sensors_and_the_audit_are_told(run: RunStore, facts: CardFacts) -> None:
    card = render_card(facts)
    assert f"commit `{COMMIT}` **with uncommitted changes" in section(card, "Reproduce")
    assert "4 groups of 4 images from 3 different prompts" in section(card, "Training data")
    assert len(audit(run).violations) == len(facts.audit.violations) > 0  # its group files were never written
    assert f"**{len(facts.audit.violations)} violations**" in section(card, "Audit")
    clean = AuditReport(num_manifests=2, num_groups=4, num_drops=0, num_retired=1, num_adapters=2, violations=())
    assert "Clean" in section(render_card(replace(facts, audit=clean)), "Audit")
    alert = Alert(sensor="dark_share", update=5, value=0.9, sentence="dark_share is <b>0.9</b>")
    told = section(render_card(replace(facts, sensors=replace(facts.sensors, alerts=(alert,)))), "Sensors")
    assert "**Sensors alerted**" in told
    assert "update 5: dark_share is &lt;b&gt;0.9&lt;/b&gt;" in told
    assert "None alerted, of" in section(card, "Sensors")


def test_a_planted_secret_reaches_neither_card_nor_configuration(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    token = "hf_" + "q7Zk2LmN9pRs4TuVw6XyAbCdEfGhIjKlMn"
    config = card_config(tiny_sd3_dir, f'reward.0.options.api_key="{token}"')
    store = bare_run(tmp_path / "run", config, trained_state(config.model))
    files = make_card(store, run_config_of(store), replace(REQUEST, version=1))
    assert not any(token.encode() in content for content in files.values())


def test_the_base_is_named_and_licensed_as_its_own_files_say(tmp_path: Path) -> None:
    revision = "0123456789abcdef" * 2
    directory = tmp_path / "models--owner--some-model" / "snapshots" / revision
    directory.mkdir(parents=True)
    (directory / "README.md").write_text("---\nlicense: other\nlicense_name: some-license\nlicense_link: LICENSE.md\n---\n# base\n")
    found = base_facts(str(directory))
    assert (found.name, found.revision) == ("owner/some-model", revision)
    assert (found.license, found.license_name, found.license_link) == ("other", "some-license", "LICENSE.md")
    (directory / "README.md").write_text("---\n: [\n---\n")
    assert base_facts(str(directory)).license == ""
    assert base_facts("models/tiny-sd3").license == "apache-2.0"
    assert base_facts("/somewhere/else/a base").name == "a base"
