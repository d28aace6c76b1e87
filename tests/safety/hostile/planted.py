"""Links planted at names that a writer could choose, and files of somebody else that look like leftovers."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from hostile.rows import EITHER, Call, Row

KIND = "planted"


def _planted(name: str, command: str, make: Any, codes: tuple[int, ...] = EITHER) -> Row:
    return Row(KIND, name, command, make, codes, ("out", "one.ckpt", "last.ckpt", "run", "cache"))


TEMPORARY = (".out.{pid}.partial", ".out.partial", ".out.{pid}.tmp")


def rows() -> Iterator[Row]:
    """Links at the temporary names of an export or a consolidation, then those of a run, then foreign files."""
    for link in TEMPORARY:
        for target in ("sub", "a.txt", "new"):
            for command in ("export",) if target != "sub" else ("export", "export-peft"):

                def exported(place, link=link, target=target, command=command):
                    ckpt, format = (place.good.checkpoint, "hf") if command == "export" else (place.good.resume, "peft")
                    arguments = ["export", "--ckpt", ckpt, "--out", "out", "--format", format]
                    return Call(arguments, links=[(link, str(place.canary / target))])

                yield _planted(f"{link} to {target}", command, exported)
    for link in (".one.ckpt.partial", ".one.ckpt.{pid}.partial", ".one.ckpt.tmp"):
        for target in ("a.txt", "new"):

            def one_file(place, link=link, target=target):
                return Call(["consolidate", place.good.shards, "one.ckpt"], links=[(link, str(place.canary / target))])

            yield _planted(f"{link} to {target}", "consolidate", one_file)
    yield from run_rows()
    yield from foreign_rows()


def run_rows() -> Iterator[Row]:
    """Links at the temporary names of a run: checkpoints, token caches, adapters."""
    for link in (".last.ckpt.partial", ".epoch=0-step=3.ckpt.partial", ".last.ckpt.{pid}.partial", ".last.ckpt.old"):
        for target in ("a.txt", "sub") if link == ".last.ckpt.partial" else ("a.txt",):

            def trained(place, link=link, target=target):
                (place.run / "checkpoints").mkdir(parents=True)
                config = place.config()
                return Call(["fit", "-c", config], links=[(f"run/checkpoints/{link}", str(place.canary / target))])

            yield _planted(f"{link} to {target}", "fit", trained)
    for link in ("train.tokens.{pid}.tmp", "tokenizer.json.{pid}.tmp"):

        def cached(place, link=link):
            config = place.config()
            folder = next((place.work / "cache").iterdir())
            for file in folder.iterdir():
                file.unlink()
            return Call(["fit", "-c", config], links=[(str(folder / link), str(place.canary / "a.txt"))])

        yield _planted(f"cache {link}", "fit", cached)
    for link in (".step-000001.partial", ".step-000001.old", ".step-000001.{pid}.partial"):

        def adapters(place, link=link):
            (place.run / "adapters").mkdir(parents=True)
            config = place.config("finetune")
            return Call(["fit", "-c", config], links=[(f"run/adapters/{link}", str(place.canary / "sub"))])

        yield _planted(f"{link} to a folder", "fit", adapters)


FOREIGN = (".thesis.old", ".draft.partial", "thesis.old", ".last.ckpt.old", ".step-000009.partial", ".partial")


def foreign_rows() -> Iterator[Row]:
    """Files and folders of somebody else in the folders that a run, a consolidation and an adapter write to."""
    turns = cycle((False, True))
    for name in FOREIGN:
        for command in ("fit", "fit-last", "consolidate", "finetune"):
            for folder in (False, True) if command == "fit" else (next(turns),):
                if command == "fit-last" and name == ".last.ckpt.old":
                    continue

                def beside(place, name=name, folder=folder, command=command):
                    homes = {"consolidate": place.work, "finetune": place.run / "adapters"}
                    home = homes.get(command, place.run / "checkpoints")
                    home.mkdir(parents=True, exist_ok=True)
                    own: Path = home / name
                    if folder:
                        own.mkdir()
                        (own / "chapter").write_text("years of work")
                    else:
                        own.write_text("years of work")
                    if command == "consolidate":
                        return Call(["consolidate", place.good.shards, "one.ckpt"], keep=[own])
                    config = place.config("finetune" if command == "finetune" else "pretrain")
                    if command == "fit-last":
                        place.save(place.contents(), "run/checkpoints/last.ckpt")
                    more = ["--ckpt_path", "last"] if command == "fit-last" else []
                    return Call(["fit", "-c", config, *more], keep=[own])

                kind = "folder" if folder else "file"
                yield _planted(f"foreign {kind} {name}", command, beside, (0,))
