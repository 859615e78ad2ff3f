"""The report: complete, well-formed, self-contained, and safe whatever the model says.

python -m pytest tests/unit/report/test_report.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.evaluation.significance import with_primary
from mipo_ray.measures import ECHO_SHARES, HELD_OUT
from mipo_ray.report.guard import guard_sentences
from mipo_ray.report.page import _behind, _table, render_report, summary_sentences
from mipo_ray.storage.manifests import GuardFacts
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.records import read_record
from tests.helpers.guard_figures import broken_bound
from tests.helpers.report_data import make_results, make_run, make_statistics, rich_run

HOSTILE = "<script>alert('x')</script><img src=x onerror=\"y\"> {{ 7 * 7 }} </pre></article> & \u202eabc"
VOID_TAGS = {"meta", "br"}
DRAWN = {"line", "circle", "path", "rect"}  # written self-closing inside svg


class StrictParser(HTMLParser):
    """Collects tags, attributes and text, and refuses tags that do not nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN, f"<{tag}/> is not a void element"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> StrictParser:
    parser = StrictParser()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_hostile_text_stays_text() -> None:
    html = render_report(make_run(HOSTILE))
    parser = parse(html)
    used = {tag for tag, _ in parser.tags}
    assert used.isdisjoint({"script", "img", "link", "iframe", "object", "a"})
    assert not [name for _, attributes in parser.tags for name in attributes if name.startswith("on")]
    assert "<script" not in html
    # title and h1; configuration; the stage's counts; reason and strategy, in tables and flow, and the reason in the
    # flow's bar; the versions; an answer's 3; 12 pairs of 4.
    assert parser.text.count(HOSTILE) == 2 + 1 + 1 + 2 + 3 + 1 + 3 + 12 * 4


@settings(max_examples=10, deadline=None)
@given(st.text(max_size=40))
def test_any_text_gives_a_well_formed_page_that_can_be_written(text: str) -> None:
    html = render_report(make_run(text))
    html.encode("utf-8")
    assert html.startswith("<!DOCTYPE html>")
    parse(html)


def test_a_page_with_every_section_is_well_formed() -> None:
    parser = parse(render_report(rich_run()))
    ids = [attributes["id"] for _, attributes in parser.tags if "id" in attributes]
    named = [attributes["aria-labelledby"] for _, attributes in parser.tags if "aria-labelledby" in attributes]
    assert len(ids) == len(set(ids)) >= 13
    assert set(named) <= set(ids)


def test_lone_surrogates_can_be_written() -> None:
    assert "a?b" in render_report(make_run("a\ud800b"))


def test_nothing_is_fetched() -> None:
    html = render_report(make_run())
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    for tag, attributes in parse(html).tags:
        assert attributes.keys().isdisjoint({"src", "href", "srcset", "action", "data", "xlink:href"}), tag


def test_the_page_holds_the_run() -> None:
    text = parse(render_report(make_run())).text
    for name in HELD_OUT:
        assert name in text
    for shown in ("4.321", "+2.50", "rose", "not distinguishable", "1 min 01 s", "2 h 03 min", "dropped: some text",
                  "PMI 3.250 nats", "PMI 11.50 nats", "(empty)", "seed: 0", "ln 2", "ceiling ln(K + 1)"):  # fmt: skip
        assert shown in text, shown


def test_curves_lie_inside_their_drawing_and_rounds_follow_each_other() -> None:
    html = render_report(make_run(pair_statistics={}))
    lines = re.findall(r'class="line" d="M([^"]+)"', html)
    assert len(lines) == 4  # loss, margin, accuracy, learning rate; a gradient norm that is never finite has no curve
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.split(" L")]
        assert len(points) == 24
        xs, ys = zip(*points, strict=True)
        assert list(xs) == sorted(set(xs))
        assert min(xs) >= 0
        assert max(xs) <= 360
        assert min(ys) >= 0
        assert max(ys) <= 220
    assert html.count('class="separator"') == 4
    # The loss falls, so its curve sinks: y grows downwards in SVG. Step 12 of 24 is followed by the second round.
    loss = [float(point.split(",")[1]) for point in lines[0].split(" L")]
    assert loss[:12] == sorted(loss[:12])
    assert loss[12] < loss[11]


def test_a_step_logged_twice_counts_once_and_a_single_step_is_drawn() -> None:
    steps = [{"round": 0, "step": 1, "loss": 9.0}, {"round": 0, "step": 1, "loss": 0.6931}]
    html = render_report(make_run(train_steps=steps))
    assert len(re.findall(r'class="line" d="M[^L"]+"', html)) == 1


def cells_of(html: str, label: str) -> list[str]:
    """The cells of the pair tables' rows whose label (with its note) is given."""
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", html)
    return [cell for name, cells in rows if re.sub("<.*?>", "|", name).startswith(label)
            for cell in re.findall(r"<td[^>]*>(.*?)</td>", cells)]  # fmt: skip


def test_pairs_are_shown_round_by_round() -> None:
    html = render_report(make_run(pair_statistics={0: make_statistics(), 1: make_statistics(scored=False)}))
    # Kept are the rows 0 to 8: 20 to 28 chosen tokens, PMI -2.5 to 5.5.
    assert cells_of(html, "kept") == ["9 (90.0%)"] * 2
    assert cells_of(html, "dropped: some text") == ["1 (10.0%)"] * 2
    assert cells_of(html, "chosen tokens|mean") == ["24.0 ± 2.7"] * 2
    assert cells_of(html, "rejected tokens|5 / 25") == ["30 / 30 / 30 / 30 / 30"] * 2
    assert cells_of(html, "chosen - rejected tokens")[0].startswith("-6.00 [-7.79, -4.21]")
    assert cells_of(html, "chosen cut at") == ["11.1% (10.0%)"] * 2
    assert cells_of(html, "PMI, nats|mean") == ["1.50 [-0.29, 3.29]", ""]
    assert cells_of(html, "PMI below zero") == ["33.3% of 9", ""]
    assert cells_of(html, "chosen texts that repeat") == ["8", "8"]
    assert cells_of(html, "rejected texts that repeat") == ["0", "0"]
    assert cells_of(html, "generated tokens per kept pair") == ["100.0", "100.0"]
    assert cells_of(html, "prefix-cache hit rate") == ["25.0% of 2,000"] * 2
    assert cells_of(html, "some text")[:4] == ["0", "2", "2 (100.0%)", "-2.00 [-2.98, -1.02]"]
    assert cells_of(html, "random_prompt")[:3] == ["0", "8", "7 (87.5%)"]


def test_histograms_fill_their_drawing_and_differ_by_more_than_colour() -> None:
    html = render_report(make_run(pair_statistics={0: make_statistics(), 1: make_statistics(scored=False)}))
    areas = re.findall(r'class="area area-([12])" d="M([^"]+)"', html)
    assert [number for number, _ in areas] == ["1", "2", "1", "1", "2"]  # lengths and PMI; lengths alone
    for _, path in areas:
        start, baseline = map(float, re.split("[,VH]", path)[:2])
        heights = [float(y) for y in re.findall(r"V([\d.]+)", path)]
        xs = [start, *map(float, re.findall(r"H([\d.]+)", path))]
        assert xs == sorted(xs)
        assert (xs[0], xs[-1]) == (52.0, 350.0)
        assert heights[-1] == baseline == 182.0
        assert 12.0 <= min(heights) < baseline
    # Rejected: all of one length. Chosen: nine lengths alike, a ninth as high.
    chosen, rejected = ([182.0 - float(y) for y in re.findall(r"V([\d.]+)", path)][:-1] for _, path in areas[:2])
    assert max(rejected) == pytest.approx(170.0)
    assert sorted({round(height, 1) for height in chosen}) == pytest.approx([0.0, 170 / 9], abs=0.1)
    assert html.count(">chosen</text>") == html.count(">rejected</text>") == 2
    assert "stroke-dasharray" in re.search(r"\.area-2 \{.*?\}", html)[0]  # type: ignore[index]


def test_every_rejected_response_is_shown_with_its_prompt() -> None:
    rejected = [{"text": f"answer {k}", "mismatched": f"question {k}"} for k in range(3)]
    html = render_report(make_run(example_pairs=[{"prompt": "p", "chosen": "c", "rejected": rejected}]))
    text = parse(html).text
    places = [text.index(shown) for k in range(3) for shown in (f"{k + 1} of 3", f"answer {k}", f"question {k}")]
    assert places == sorted(places)


def test_statistics_of_a_former_release_have_a_table() -> None:
    former = {"rows": 4, "kept": 3, "dropped": {"empty": 1}, "chosen_truncated_share": 0.5,
              "generated_tokens_per_pair": 7.25}  # fmt: skip
    html = render_report(make_run(pair_statistics={0: read_record(PairStatistics, json.dumps(former), "former")}))
    parse(html)
    assert cells_of(html, "dropped: empty") == ["1 (25.0%)"]
    assert cells_of(html, "generated tokens per kept pair") == ["7.2"]
    assert 'class="area' not in html


def test_an_empty_run_has_a_page() -> None:
    nothing: dict[str, Any] = dict.fromkeys(["train_steps", "stages", "example_pairs", "answers"], ())
    html = render_report(make_run(results={}, versions={}, pair_statistics={}, **nothing))
    assert "Nothing was measured" in parse(html).text
    assert "<svg" not in html


def test_the_summary_says_plainly_what_changed() -> None:
    finding, power, caveat = summary_sentences(make_results(context_pmi_initial=2.5, reward_accuracy=0.25))
    assert finding.startswith("After 2 rounds, the mutual information between answer and user context")
    assert "rose from 4.321 to 6.821 nats per response (change +2.500 [+2.450, +2.550])" in finding
    assert "reward" not in finding  # the first sentence is about the primary measure alone
    # 0.05 nats is half an interval; (1.96 + 0.84) / 1.96 of it is found in 4 of 5 cases.
    assert "64 prompts show a change of about 0.0715 nats per response in 4 of 5 cases" in power
    assert "no warning" in caveat


def test_the_summary_does_not_claim_what_the_interval_does_not_show() -> None:
    finding = summary_sentences(make_results(context_pmi_initial=0.01, reward_accuracy=-0.25))[0]
    assert "is not distinguishable from the base" in finding


def test_the_first_sentence_is_about_the_measure_that_was_named() -> None:
    made = make_results(reward_accuracy=0.25)
    results = {key: with_primary(entries, "reward_accuracy") for key, entries in made.items()}
    finding = summary_sentences(results)[0]
    assert finding == "After 2 rounds, reward accuracy rose from 4.321 to 4.571 (change +0.250 [+0.200, +0.300])."


def test_exploratory_verdicts_are_corrected_for_their_number_in_sentence_and_table() -> None:
    results = make_results(reward_margin=0.2, context_pmi_initial=0.2)
    p_values = {name: 0.01 for name in HELD_OUT if name not in ("corpus_distinct_2", *ECHO_SHARES)}
    results["1"] = with_primary(
        {name: replace(entry, change_p_value=p_values.get(name)) for name, entry in results["1"].items()},
        "context_pmi_initial",
    )
    rows = {row["name"]: row for row in _table(results)}
    assert rows["context_pmi_initial"]["rounds"][1]["word"] == "rose"
    assert rows["reward_margin"]["rounds"][1]["word"] == "not distinguishable"  # 0.01 times 27 is no longer small
    assert rows["reward_margin"]["rounds"][0]["word"] == "rose"  # of an earlier version, which corrected nothing
    said = " ".join(summary_sentences(results))
    assert "All others are exploratory: the verdicts on their 27 changes" in said


def test_few_clusters_are_warned_of() -> None:
    results = make_results(context_pmi_initial=0.2)
    for policy in results.values():
        for name in policy:
            policy[name] = replace(policy[name], users=3, questions=6)
    few = "Few clusters: 3 users and 6 questions; with fewer than 15 of a kind an interval is a rough guide."
    assert summary_sentences(results)[2] == few
    assert _behind(results) == "3 users and 6 questions"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"response_tokens": -1.8}, "answers became 42% shorter"),
        ({"response_tokens": 1.0}, "answers became 23% longer"),
        ({"copy_rate": 0.2}, "repeats the prompt (+0.200"),
        ({"only_copies": 0.2}, "do nothing but repeat the prompt"),
        ({"truncated": 0.2}, "cut at the length limit"),
        ({"distinct_2": -0.2}, "repeat themselves more"),
    ],
)
def test_the_summary_warns_of_a_bought_rise(changes: dict[str, float], warning: str) -> None:
    *_, caveat = summary_sentences(make_results(context_pmi_initial=2.5, **changes))
    assert warning in caveat
    assert "The rise may be bought by this" in caveat
    *_, without_rise = summary_sentences(make_results(**changes))
    assert warning in without_rise
    assert "bought" not in without_rise


def test_without_contexts_the_summary_speaks_of_prompts() -> None:
    results = make_results(pmi_initial=1.0)
    for entries in results.values():
        del entries["context_pmi_initial"], entries["reward_accuracy"]
    finding = summary_sentences(results)[0]
    assert "between answer and prompt" in finding
    assert "rose" in finding
    assert "reward" not in finding


BAD = GuardFacts(compared=9, broken=[broken_bound(), broken_bound("truncated", 0.7)])
GOOD = GuardFacts(compared=9, broken=[])


def test_a_round_that_was_found_bad_is_told_with_its_cause_and_the_sentences_are_about_the_last_good_one() -> None:
    results = make_results(context_pmi_initial=2.5, self_bleu=0.25)
    page = parse(render_report(make_run(results=results, verdicts={"0": GOOD, "1": BAD}))).text
    summary = page[page.index("After one round") :]  # round 0 alone, which changed nothing
    assert "After one round, the mutual information between answer and user context" in summary
    assert (
        "The guard found round 1 bad: self-BLEU 0.412, expected at most 0.309 (the base has 0.109); cut at the limit "
        "0.700, expected at most 0.309 (the base has 0.109)." in summary
    )
    assert "No round starts from a policy that was found bad; the policy of the run is that of round 0." in summary
    assert "round 1, not promoted" in summary
    assert "round 0, not promoted" not in summary
    assert "all 9 bounds kept" in summary
    assert "the base: 0.109" in summary


def test_a_guard_that_found_nothing_is_a_sentence_and_without_one_there_is_no_word_of_it() -> None:
    kept = parse(render_report(make_run(verdicts={"0": GOOD, "1": GOOD}))).text
    assert "The guard found no bound broken." in kept
    assert "not promoted" not in kept
    assert "guard" not in parse(render_report(make_run())).text.lower()


def test_where_every_round_was_found_bad_the_initial_model_is_the_policy() -> None:
    sentences = summary_sentences(make_results(), ["0", "1"])
    assert sentences[0] == "No round was promoted."
    assert guard_sentences({"0": BAD, "1": BAD}, make_results())[-1].endswith(
        "the policy of the run is the initial model."
    )


def test_the_base_alone_is_called_that() -> None:
    first, power = summary_sentences({"base": make_results()["base"]})
    assert first == "Only the initial model has been measured so far."
    assert power.startswith("What the held-out prompts could show: context PMI:")
