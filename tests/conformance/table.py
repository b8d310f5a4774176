"""What every optimizer works with, as Markdown, from the data of `tests.conformance.cases`.

python -m tests.conformance.table
"""

from tests.conformance.cases import CAPABILITIES, CASES


def render() -> str:
    """A sentence of what all can do, and a table of the rest."""
    partly = [name for name in CAPABILITIES if any(name in case.limits for case in CASES)]
    common = ", ".join(text for name, text in CAPABILITIES.items() if name not in partly)
    rows = [
        ["optimizer", *(CAPABILITIES[name] for name in partly)],
        ["---"] * (1 + len(partly)),
        *(
            [f"`{case.name}`", *("" if name in case.limits else "yes" for name in partly)]
            for case in CASES
        ),
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"All: {common}.\n\n{table}"


if __name__ == "__main__":
    print(render())
