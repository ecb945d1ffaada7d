"""The seven sub-scenarios of FlexGen's HELM table: what HELM calls them, what they need, what they are scored by.

Knows no model and no prompts. HELM's documentation and paper describe the scenarios (Liang et al., 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field

_WIKIFACT = "https://worksheets.codalab.org/rest/bundles/0x8c3b60eb7c6b462e822a150f194d3b35/contents/blob"
_XSUM = "https://storage.googleapis.com/crfm-helm-public/source_datasets/scenarios/summarization_scenario"
_MMLU = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"


@dataclass(frozen=True, slots=True)
class DataFile:
    """Something HELM downloads: ``place`` below HELM's output folder, and where it comes from."""

    place: str
    url: str
    unpack: bool = False


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How HELM turns instances of a scenario into prompts."""

    instructions: str = ""
    input_prefix: str = ""
    input_suffix: str = "\n"
    output_prefix: str = ""
    output_suffix: str = "\n"
    examples: int = 5
    max_tokens: int = 5
    stop: tuple[str, ...] = ("\n",)


@dataclass(frozen=True, slots=True)
class SubScenario:
    """One row of the table.

    ``entry`` is HELM's run entry, ``metric`` what is reported first, ``metrics`` all that ``score`` computes.
    ``style`` is there for those that need no download. ``prompt_tokens`` and ``new_tokens`` are typical, for plans;
    ``minutes`` are FlexGen's for OPT-IML-30B, ``full`` how many instances HELM's leaderboard runs take at most.
    """

    name: str
    entry: str
    metric: str
    minutes: int
    prompt_tokens: int
    new_tokens: int
    outputs: int = 1
    style: PromptStyle | None = None
    metrics: tuple[str, ...] = ()
    data: tuple[DataFile, ...] = field(default=())
    full: int = 1000


_EXACT = ("exact_match", "quasi_exact_match", "prefix_exact_match", "quasi_prefix_exact_match")
_WIKIFACT_FILES = tuple(
    DataFile(f"scenarios/wikifact/data/{split}.jsonl", f"{_WIKIFACT}/{split}.jsonl")
    for split in ("train", "dev", "test")
)
_MMLU_FILES = (DataFile("scenarios/mmlu/data", _MMLU, unpack=True),)

SUBSET: tuple[SubScenario, ...] = (
    SubScenario(
        "wikifact_plaintiff",
        "wikifact:k=5,subject=plaintiff",
        "exact_match@5",
        10,
        120,
        8,
        outputs=5,
        data=_WIKIFACT_FILES,
    ),
    SubScenario(
        "wikifact_instance_of",
        "wikifact:k=5,subject=instance_of",
        "exact_match@5",
        55,
        90,
        8,
        outputs=5,
        data=_WIKIFACT_FILES,
    ),
    SubScenario(
        "mmlu_abstract_algebra",
        "mmlu:subject=abstract_algebra,method=multiple_choice_joint",
        "exact_match",
        31,
        420,
        5,
        data=_MMLU_FILES,
        full=111,
    ),
    SubScenario(
        "mmlu_us_foreign_policy",
        "mmlu:subject=us_foreign_policy,method=multiple_choice_joint",
        "exact_match",
        33,
        460,
        5,
        data=_MMLU_FILES,
        full=111,
    ),
    SubScenario(
        "synthetic_reasoning_pattern_match",
        "synthetic_reasoning:mode=pattern_match",
        "exact_match",
        118,
        420,
        50,
        metrics=_EXACT,
        style=PromptStyle("Please solve the following problem.\n", output_prefix="Target: ", max_tokens=50, examples=5),
    ),
    SubScenario(
        "synthetic_reasoning_natural_easy",
        "synthetic_reasoning_natural:difficulty=easy",
        "f1_set_match",
        100,
        430,
        20,
        metrics=("f1_set_match", "iou_set_match", "exact_set_match"),
        style=PromptStyle("Please solve the following problem.\n", input_prefix="Rules:\n", max_tokens=20, examples=3),
    ),
    SubScenario(
        "summarization_xsum_sampled",
        "summarization_xsum_sampled:temperature=0.3,device=cpu",
        "rouge_2",
        902,
        1550,
        64,
        data=(DataFile("scenarios/summarization/data/xsum-sampled.pk", f"{_XSUM}/xsum-sampled.pk"),),
    ),
)


def by_name(names: str) -> tuple[SubScenario, ...]:
    """The scenarios that ``names`` says: all, own (those that need no download), or names separated by commas."""
    if names == "all":
        return SUBSET
    if names == "own":
        return tuple(scenario for scenario in SUBSET if scenario.style is not None)
    known = {scenario.name: scenario for scenario in SUBSET}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--scenarios {unknown[0]}: no such scenario: give all, own, or some of {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))
