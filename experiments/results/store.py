"""A study's MLflow store as one small file, without weights: kept, and made whole again.

    python experiments/results/store.py keep OUTPUT FILE.tar.xz
    python experiments/results/store.py restore FILE.tar.xz OUTPUT

OUTPUT is the output folder, spelt as the run had it, from the folder that it was run in. `ssl-ray report` then makes
the page again, and `ssl-ray run` goes on from there: what is finished is not trained again. A pretraining is, where a
new cell starts from its weights.
"""

import sqlite3
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path

_PLACE = Path("/kept/results")
"""Stands for the output folder, whose artifacts MLflow knows by absolute paths."""
_CHECKOUT = Path("/kept/checkout")
"""Stands for the folder that the study was run in, below which volumes may lie."""
_LEFT_OUT = (".safetensors", ".pt", "/models", "/report")
"""Ends of names: weights, networks with their code, and pages that are made again."""


def keep(output: Path, file: Path) -> None:
    """Pack MLflow's database and artifacts of an output folder."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(file, "w:xz") as packed:
        script = Path(folder) / "mlflow.sql"
        with closing(sqlite3.connect(f"{(output / 'mlflow.db').absolute().as_uri()}?mode=ro", uri=True)) as database:
            text = _moved("\n".join(database.iterdump()), output.absolute(), _PLACE)
            script.write_text(_moved(text, Path.cwd(), _CHECKOUT))
        packed.add(script, script.name, filter=_plain)
        packed.add(output / "artifacts", "artifacts", filter=_plain)


def restore(file: Path, output: Path) -> None:
    """Unpack it into an output folder that has no store yet."""
    if (output / "mlflow.db").exists():
        raise SystemExit(f"{output}: has a store of its own")
    with tarfile.open(file) as packed:
        # The first releases of Python 3.11 know no filter; what `keep` packs has no links and no paths to elsewhere.
        packed.extraction_filter = getattr(tarfile, "data_filter", None)
        packed.extractall(output)
    script = output / "mlflow.sql"
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # SQL from anywhere is to reach no other file
        database.executescript(_moved(script.read_text(), _PLACE, output.absolute()))
    script.unlink()


def _moved(script: str, old: Path, new: Path) -> str:
    """The SQL with another folder in all paths and URIs."""
    return script.replace(f"{old.as_uri()}/", f"{new.as_uri()}/").replace(f"{old}/", f"{new}/")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The entry without whose file it was and when; None for what is left out."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return None if entry.name.endswith(_LEFT_OUT) else entry


if __name__ == "__main__":
    match sys.argv[1:]:
        case "keep", output, file:
            keep(Path(output), Path(file))
        case "restore", file, output:
            restore(Path(file), Path(output))
        case _:
            raise SystemExit(__doc__)
