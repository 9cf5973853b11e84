"""A raw row becomes preferences: of several scored answers each pair that `PAIRINGS` names, in the better one's favour, or
all of them as a list; and with a pair, its gold answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from dspref.data.beside import unused
from dspref.data.formats import Preference, pair_of, to_preference
from dspref.data.given import OF_RANKS, SCORES, given_in, number_of, of_scores, with_gap
from dspref.data.gold import REFERENCE, gold_of
from dspref.data.image_rows import column_of
from dspref.data.labelled import is_labelled, of_one, to_answer
from dspref.data.messages import answer_of, is_blank, stripped, unwrapped
from dspref.data.normalise import conversation_in, normalise, without_null_prompt
from dspref.data.rows import Columns, RowError, Text, Values, close_name, find, given, kind_of, missing, parse_json, what_is

SAMPLED_TWICE = "pair of a row with equal answers of several scores, some of which make no pair: none is better than itself"
RANKED_FIELDS = ("completions", "scores", "ranks")
# (score, answer)
Scored = tuple[float, Text]

# Which of n answers, best first, make a pair. All pairs: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
PAIRINGS: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "all": lambda n: list(combinations(range(n), 2)),
    "best_against_rest": lambda n: [(0, j) for j in range(1, n)],
    "best_against_worst": lambda n: [(0, n - 1)] if n > 1 else [],
}
# In their place: the answers of a row are one list.
LIST = "list"
ALONE = "one answer alone, and this objective compares several"
NONE_BETTER = "no answer is better than another"
SWAPPED = "pair whose rejected answer has the higher score, and is the better one of its list"


def to_preferences(
    values: Values,
    columns: Columns | None = None,
    template: Mapping[str, str] | None = None,
    pairs: str = "all",
    *,
    as_: str | None = None,
    chat_model: bool = False,
    repeated: bool = True,
    key: str = "data.train",
    pair_weights: str | None = None,
) -> list[Preference | RowError]:
    """Convert one raw row, which may hold several scored answers instead of two: `pairs` says which of them make a pair
    (all | best_against_rest | best_against_worst), and `pair_weights` what pairs weigh (score_gap; None: what the row says).
    With `pairs: list` each answer stands alone, labelled as one of the best or not, with its score, and a pair is a list of
    two; where `columns` name a reference, that answer stands alone behind the pairs, labelled true.

    An answer that cannot be used is an error in its place, and the others make pairs. Takes `as_`, `chat_model` and
    `repeated`, and raises, as `to_preference` does; `key`: where the source stands in the YAML, for the fixes of errors."""
    try:
        if not template and is_labelled(values, columns):
            if pairs == LIST or REFERENCE in (template or given(columns)):
                fix = "use rows of two answers, or of completions and scores, or set objective.name: kto"
                raise RowError("label", ALONE, fix)
            if pair_weights is not None:
                fix = "drop pair_weights; a column of weights (data.train.columns.weight) weighs answers"
                raise RowError("label", "one answer alone, and pair_weights weighs pairs", fix)
            answer = to_answer(values, columns, as_=as_, chat_model=chat_model)
            made, ranked = [replace(answer, given=given_in(values, given(columns)))], False
        elif template or not is_ranked(values, columns):
            _refuse_beside_template(columns, pairs, template)
            pair = to_preference(values, columns, template, as_=as_, chat_model=chat_model, repeated=repeated)
            numbers = given_in(values, given(columns))
            made, ranked = [_of_two(pair, numbers) if pairs == LIST else replace(pair, given=numbers)], False
        else:
            about_images = chat_model and "images" in column_of(values, given(columns))  # a text has no place for one
            made, ranked = _pairs_of(values, columns, pairs, as_ or ("chat" if about_images else None)), True
        if REFERENCE in (template or given(columns)):
            made = _with_gold(made, values, given(columns), template)
        if pair_weights is not None:
            made = [replace(item, given=with_gap(item.given)) if isinstance(item, Preference) else item for item in made]
    except RecursionError:
        raise RowError("row", "nested too deeply", "write a plainer row") from None
    except RowError as error:
        raise error.of(key) from None
    named = None if template else given(columns)
    return [item.of(key) if isinstance(item, RowError) else _told(item, values, named, ranked) for item in made]


def _with_gold(
    made: Sequence[Preference | RowError], values: Values, named: Mapping[str, str], template: Mapping[str, str] | None
) -> list[Preference | RowError]:
    first = next((item for item in made if isinstance(item, Preference)), None)
    return [*made, replace(gold_of(first, values, named, template), given=first.given)] if first else [*made]


def _of_two(pair: Preference, numbers: Mapping[str, float]) -> Preference:
    """A pair as a list of two: without scores, each has the share of the list that it is better than; with scores, the one
    with the higher score is the chosen one."""
    chosen, rejected = (numbers.get(name, share) for name, share in zip(SCORES, (0.5, 0.0)))
    if chosen == rejected:
        raise RowError(SCORES[0], NONE_BETTER, droppable=True)
    if rejected > chosen:
        whole = pair.whole and (pair.whole[1], pair.whole[0])
        pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen, whole=whole, unused=(*pair.unused, SWAPPED))
    return replace(pair, given={**numbers, **of_scores(max(chosen, rejected), min(chosen, rejected))})


def _told(pair: Preference, values: Values, named: Mapping[str, str] | None, ranked: bool) -> Preference:
    notes = unused(values, named, pair, ranked)
    return replace(pair, unused=pair.unused + notes) if notes else pair


def is_ranked(values: Values, columns: Columns | None) -> bool:
    """Whether a row's answers are its completions: where their columns are named, whatever else it has; by their own name,
    where no column holds a chosen answer."""
    named = given(columns)
    if named.keys() & set(RANKED_FIELDS):
        return True
    none_chosen = values.get(named.get("chosen", "chosen")) is None  # Arrow gives each row the columns of all
    return (
        none_chosen
        and "chosen" not in named
        and values.get("completions") is not None
        and "completions" not in named.values()
    )


def _refuse_beside_template(columns: Columns | None, pairs: str, template: Mapping[str, str] | None) -> None:
    unread = [f"columns.{field}" for field in RANKED_FIELDS if field in given(columns)]
    unread += ["pairs"] if pairs not in ("all", LIST) else []
    if template and unread:
        raise RowError(unread[0], "has no effect: a template makes one pair of a row", "drop one of them")


def _pairs_of(values: Values, columns: Columns | None, pairs: str, as_: str | None) -> list[Preference | RowError]:
    named = given(columns)
    if beside := sorted(named.keys() & {"chosen", "rejected"}):
        raise RowError(f"columns.{beside[0]}", "two answers and several scored ones are given", "name one or the other")
    answers, errors = ranked(values, named, as_)
    shared = given_in(values, {name: column for name, column in named.items() if name not in SCORES})
    if pairs == LIST:
        fields = normalise(values, columns, None, as_, ranked=True)
        return [*errors, *_list_of(fields, answers, bool(errors), values, columns, shared)]
    scored = any(name in named for name in SCORES)
    if scored and _judged_by(values, named) == "ranks":
        raise RowError("ranks", OF_RANKS, "set data.train.columns.scores")
    candidates = [(answers[i], answers[j]) for i, j in PAIRINGS[pairs](len(answers))]
    better = [(best, worst) for best, worst in candidates if best[0] > worst[0]]
    kept = _agreed(better, answers)
    if not kept and not errors:
        reason = NONE_BETTER + (", as equal answers have several scores" if better else "")
        raise RowError("completions", reason, droppable=True)
    fields = normalise(values, columns, None, as_, ranked=True)
    made = [_pair(fields, best, worst, values, columns, shared, scored) for best, worst in kept]
    said = {str(error): error for error in made if isinstance(error, RowError)}
    told = (SAMPLED_TWICE,) if len(kept) < len(better) else ()
    pairs_made = [replace(item, unused=told) for item in made if isinstance(item, Preference)]
    return [*errors, *said.values(), *pairs_made]


def _list_of(
    fields: Values,
    answers: Sequence[Scored],
    others_failed: bool,
    values: Values,
    columns: Columns | None,
    shared: Mapping[str, float],
) -> list[Preference | RowError]:
    """All answers of a row, the best first, each by itself. Raises RowError where none is better than another."""
    scores = [score for score, _ in answers]
    if len(set(scores)) < 2:
        if others_failed:
            return []
        raise RowError("completions", NONE_BETTER, droppable=True)
    if _judged_by(values, given(columns)) == "ranks":
        # As Liu et al. 2024 (arXiv:2402.01878, section 5.4) label lists that people have ranked.
        scores = [sum(other < score for other in scores) / len(scores) for score in scores]
    made: list[Preference | RowError] = []
    for score, (_, answer) in zip(scores, answers):
        own = answer_of(answer, "completions", fields.get("prompt"))
        row = without_null_prompt({**fields, "chosen": own, "rejected": own, "label": score == scores[0]}, given(columns))
        try:
            made.append(replace(pair_of(row, values, columns), given={**shared, **of_scores(score, score)}))
        except RowError as error:
            made.append(of_one(error))
    return made


def _agreed(candidates: Sequence[tuple[Scored, Scored]], answers: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Pairs of a better and a worse answer without those that the scores of the row say the other way round too: an answer
    that was sampled twice may have one score above another answer's and one below. Nor is it better than itself."""
    texts = [(score, repr(stripped(answer))) for score, answer in answers]
    said = {(best, worst) for high, best in texts for low, worst in texts if high > low}

    def holds(pair: tuple[Scored, Scored]) -> bool:
        best, worst = (repr(stripped(answer)) for _, answer in pair)
        return best != worst and (worst, best) not in said

    return [pair for pair in candidates if holds(pair)]


def _pair(
    fields: Values,
    best: Scored,
    worst: Scored,
    values: Values,
    columns: Columns | None,
    shared: Mapping[str, float],
    scored: bool,
) -> Preference | RowError:
    prompt = fields.get("prompt")
    answers = {"chosen": answer_of(best[1], "chosen", prompt), "rejected": answer_of(worst[1], "rejected", prompt)}
    try:
        numbers = {**shared, **(of_scores(best[0], worst[0]) if scored else {})}
        return replace(pair_of(without_null_prompt({**fields, **answers}, given(columns)), values, columns), given=numbers)
    except RowError as error:
        return error


def ranked(values: Values, named: Mapping[str, str], as_: str | None = None) -> tuple[list[Scored], list[RowError]]:
    """(score, answer) of a row's answers, best first, equal scores in the order of the row, and errors for those that cannot
    be used; what has no score is left out. The score of a rank is what lies below it."""
    by = _judged_by(values, named)
    if by not in named and by not in values and (close := close_name("ranks", values)):
        raise missing("ranks", {**values, close: None}, "ranks")
    of_answers, of_scores = named.get("completions", "completions"), named.get(by, by)
    completions, scores = _items(values, of_answers, "completions"), _items(values, of_scores, by)
    if len(completions) != len(scores):
        raise RowError(of_scores, f"{len(scores)} {by} for {len(completions)} completions")
    if as_ != "text":
        read = [conversation_in(completion, f"{of_answers}[{number}]") for number, completion in enumerate(completions)]
        completions = read if all(kind_of(unwrapped(item)) == "chat" for item in read) else completions
    known, errors = [], []
    for number, (score, completion) in enumerate(zip(scores, completions)):
        if score is None or (isinstance(score, str) and not score.strip()):
            continue
        try:
            better = number_of(score, f"{of_scores}[{number}]") * (-1 if by == "ranks" else 1)
            known.append((better, _answer(completion, f"{of_answers}[{number}]", as_)))
        except RowError as error:
            errors.append(error)
    return sorted(known, key=lambda scored: -scored[0]), errors


def _judged_by(values: Values, named: Mapping[str, str]) -> str:
    """scores, of which the higher is the better, or ranks, of which 1 is the best: what is named, or else there."""
    both = [field for field in ("scores", "ranks") if field in named] or [
        field for field in ("scores", "ranks") if values.get(field) is not None and field not in named.values()
    ]
    if len(both) > 1:
        fix = "name one: data.train.columns.scores (higher is better) or data.train.columns.ranks (lower is better)"
        raise RowError("ranks", "scores and ranks are given", fix)
    return both[0] if both else "scores"


def _answer(value: Any, place: str, as_: str | None) -> Text:
    """One of several answers: a text, a message list, or a single message."""
    if as_ == "text" and not isinstance(value, str):
        raise RowError(place, f"{what_is(value)}, not text, and as: text is set", "drop data.train.as")
    answer = answer_of(unwrapped(value), place, behind=None)
    if is_blank(answer):
        raise RowError(place, "empty answer")
    return answer


def _items(values: Values, name: str, field: str) -> list[Any]:
    """The items of a column that holds a list, or JSON text of one; of `column.key`, that key of each item, or of an object
    around the list, at any depth."""
    column, _, key = name.partition(".") if name not in values else (name, "", "")
    if column not in values:
        raise missing(field, values, column)
    items = values[column]
    if isinstance(items, str) and items.lstrip().startswith(("[", "{") if key else "["):
        items = parse_json(items, column, "write a JSON list")
    while key and isinstance(items, dict):
        inner, _, rest = (key, "", "") if key in items else key.partition(".")
        if inner not in items:
            raise RowError(column, f"no {inner!r} in it", f"set data.train.columns.{field}")
        items, key, column = items[inner], rest, f"{column}.{inner}"
    if not isinstance(items, list) or not items:
        raise RowError(column, "an empty list" if items == [] else f"{what_is(items)}, not a list")
    if not key:
        return items
    found = [find(item, key) if isinstance(item, dict) else (False, None) for item in items]
    # A key that is null in one item is not there where the row comes from Arrow.
    if not all(isinstance(item, dict) for item in items) or not any(there for there, _ in found):
        raise RowError(column, f"an item without {key!r}", f"set data.train.columns.{field}")
    return [value for _, value in found]
