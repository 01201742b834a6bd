"""The ranked table as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence

from amt_ray.report import words
from amt_ray.report.ranking import Comparison, Row
from amt_ray.report.table import Column, columns, result_meaning

LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"$<$", ">": r"$>$", "±": r"$\pm$", "−": "$-$", words.NOTHING: "--"},
}


def markdown(comparison: Comparison) -> str:
    """Headline, what to know, the ranked table, and the tests."""
    shown, lines = _brief(comparison), [f"# {comparison.source.title}", "", words.headline(comparison), ""]
    for sentence in filter(
        None, (words.sampling(comparison), *words.warnings(comparison), *words.retrained_sentences(comparison))
    ):
        lines += [sentence, ""]
    lines.append(_row([column.heading for column in shown]))
    lines.append(_row([":--" if column.text else "--:" for column in shown]))
    lines += [_row([_flat(column.of(row).shown) for column in shown]) for row in _rows(comparison)]
    return "\n".join([*lines, "", words.tests(comparison), ""])


def latex(comparison: Comparison) -> str:
    """A ``tabular`` with booktabs' rules; the headline and the tests are comments."""
    shown = _brief(comparison)
    alignment = "".join("l" if column.text else "r" for column in shown)
    told = (
        words.headline(comparison),
        words.sampling(comparison),
        *words.warnings(comparison),
        words.tests(comparison),
    )
    lines = [f"% {' '.join(sentence.split())}" for sentence in told if sentence]
    lines += ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{alignment}}}", "\\toprule"]
    lines += [_latex_row([column.heading for column in shown]), "\\midrule"]
    lines += [_latex_row([column.of(row).shown for column in shown]) for row in _rows(comparison)]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def csv_text(comparison: Comparison) -> str:
    """Every column in full precision, a line a setting; then its runs and each seed's value of the metric."""
    every, metric = columns(comparison), comparison.source.metric
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*(_csv_name(comparison, column) for column in every), "runs", f"{metric} of seeds"])
    for row in _rows(comparison):
        runs = " ".join(run.run_id for run in row.group.runs)
        seeds = " ".join(f"{seed}={value!r}" for seed, value in row.by_seed.items())
        writer.writerow([*(_raw(column.of(row).raw) for column in every), runs, seeds])
    return file.getvalue()


def _csv_name(comparison: Comparison, column: Column) -> str:
    """Keys and metrics by their full names."""
    if column.meaning in comparison.keys:
        return column.meaning
    return comparison.source.metric if column.meaning == result_meaning(comparison.source.metric) else column.heading


def _raw(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _rows(comparison: Comparison) -> Sequence[Row]:
    return (*comparison.rows, *comparison.retrained)


def _brief(comparison: Comparison) -> list[Column]:
    """The columns of a paper's table; the run's name where no key tells the rows apart."""
    return [c for c in columns(comparison) if c.brief or (c.heading == "run" and not comparison.keys)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _flat(text: str) -> str:
    """One line, without what Markdown reads as markup."""
    return "".join(f"\\{sign}" if sign in "|\\`*_<[" else sign for sign in " ".join(text.split()))


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(sign, sign) for sign in " ".join(cell.split())) for cell in cells) + r" \\"
