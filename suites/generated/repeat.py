"""The script that repeats a failure: it needs torch and the subject, nothing of this project."""

from __future__ import annotations

import ast
import pprint
import re
from pathlib import Path
from typing import Any

from generated.emit import source
from generated.judge import Difference, expected
from generated.tensor_texts import Case

HERE = Path(__file__).parent
_MARK = "CASE = "

_HEAD = '''"""{title}

    python {name} [SUBJECT]         starts its {world} ranks itself (default subject: {subject})
    torchrun --nproc-per-node {world} {name} [SUBJECT]

Ends with 1 while the failure repeats, with 0 once each rank gets what it must, with 2 where a rank
neither answers nor fails in {limit} s (it hangs, which is a failure as well).
Needs torch alone, and the subject. Made by ci/fuzz{more}.
"""
'''
_MAIN = '''

# --- the ranks ---


def rank_main(rank: int, world: int, root: str, store: Any) -> None:
    """Be one rank: run the case, and say where what comes is not what must come."""
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    teller, comparison, done = Teller(), Comparison(), []

    def subject(path: str) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"{root}.{module}"), name)

    def tell(word: str, value: Any, changed: Any, **given: Any) -> None:
        told = outcome(teller, word, value, changed, given)
        number = len(done)
        done.append(told)
        text = comparison.difference(EXPECTED[number][rank], told)
        print(f"rank {rank}, call {number + 1}: {text or 'as expected'}", flush=True)
        if text:
            os._exit(1)

    watch = Watch()
    run(rank, subject, tell, watch.on)
    del teller
    if living := watch.living():
        print(f"rank {rank}: {', '.join(living)} outlive the case", flush=True)
        os._exit(1)
    os._exit(0)


def main() -> int:
    """Start the ranks, or be one of torchrun's."""
    root = sys.argv[1] if len(sys.argv) > 1 else SUBJECT
    if "RANK" in os.environ:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        rank_main(int(os.environ["RANK"]), WORLD, root, store)
    importlib.import_module(f"{root}._state_dict_utils")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = []
        for rank in range(WORLD):
            store = dist.FileStore(f"{folder}/store", WORLD)
            ranks.append(context.Process(target=rank_main, args=(rank, WORLD, root, store)))
            ranks[-1].start()
        end = time.monotonic() + LIMIT
        for process in ranks:
            process.join(max(end - time.monotonic(), 0.1))
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        codes = [process.exitcode for process in ranks]
    failed = any(codes[rank] for rank in range(WORLD) if rank not in late)
    if late:
        print(f"ranks {late} never answered" + ("" if failed else ": they hang"))
    return 1 if failed else 2 if late else 0


if __name__ == "__main__":
    sys.exit(main())
'''
LIMIT = 20
_RULE = "\n\n# --- {} ---\n"


def script(case: Case, difference: Difference, subject: str, name: str, more: str = "") -> str:
    """The script's text."""
    title = f"{subject}: {difference}".replace("\\", "/").replace('"', "'")[:400]
    head = _HEAD.format(
        title=title, name=name, world=case["world"], subject=subject, limit=LIMIT, more=more
    )
    own = {name: _own(HERE / f"{name}.py") for name in ("data", "telling", "rig", "compare")}
    imports = sorted({line for text in own.values() for line in text[0]} | _IMPORTS)
    parts = [
        head,
        "from __future__ import annotations\n",
        "\n".join(imports),
        f"\nSUBJECT = {subject!r}\nWORLD = {case['world']}\nLIMIT = {LIMIT}",
        f"{_MARK}{pprint.pformat(case, width=96, sort_dicts=False)}\n\n",
        source(case),
        f"\nEXPECTED = {pprint.pformat(expected(case), width=96, sort_dicts=False)}",
        '"""[call][rank]: what must come; a field that is missing may be anything."""\n',
        *(_RULE.format(name) + text for name, (_, text) in own.items()),
        _MAIN,
    ]
    return "\n".join(parts)


_IMPORTS = {
    "import datetime",
    "import importlib",
    "import multiprocessing",
    "import sys",
    "import tempfile",
    "import time",
}


def _own(path: Path) -> tuple[list[str], str]:
    """(imports, the rest) of a module."""
    text = path.read_text()
    tree = ast.parse(text)
    found = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    foreign = [n for n in found if not re.match("__future__|generated", _module_of(n))]
    imports = [ast.unparse(n) for n in foreign]
    last = max(n.end_lineno or 0 for n in found)
    return imports, "\n".join(text.splitlines()[last:]).strip("\n")


def _module_of(node: ast.Import | ast.ImportFrom) -> str:
    return "" if isinstance(node, ast.Import) else node.module or ""


def case_in(path: Path) -> Case:
    """The case that a script repeats; ValueError where it holds none."""
    found = re.search(rf"^{_MARK}(.*?)\n\n\n", path.read_text(), re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} is no script of ci/fuzz: it has no line that begins {_MARK!r}")
    case: Any = ast.literal_eval(found[1])
    return case
