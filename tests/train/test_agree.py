"""Two ranks look at the files of a checkpoint, each at its share, and say the same."""

import shutil
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_adapt.checkpoint.intact import record_files
from megatron_adapt.checkpoint.root import LATEST_FILE, name_iteration
from megatron_adapt.errors import CheckpointError
from megatron_adapt.train.agree import check_saved, run_on_main
from tests.helpers.spawn import run_ranks

LARGE, SMALL = "__0_0.distcp", "__1_0.distcp"
"By size dealt to ranks 0 and 1."


def make_root(root, *steps):
    for step in steps:
        folder = root / name_iteration(step)
        folder.mkdir(parents=True)
        for name, size in ((LARGE, 999), (SMALL, 500), (".metadata", 100), ("common.pt", 10)):
            (folder / name).write_bytes(bytes(range(step, step + 10)) * (size // 10))
        record_files(folder)
    return root


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def try_to(act):
    try:
        act()
    except CheckpointError as error:
        return str(error)
    return ""


def check_all(folders):
    def fail():
        raise OSError(28, "No space left on device", "some/file")

    dist.init_process_group("gloo")
    try:
        found = {
            name: try_to(lambda folder=folder: check_saved(folder, verify=True)) for name, folder in folders.items()
        }
        by_size = try_to(partial(check_saved, folders["flipped"], verify=False))
        other = try_to(partial(check_saved, folders["cut"], verify=False, continues=False))
        return found, by_size, other, try_to(partial(run_on_main, fail)), run_on_main(dist.get_rank)
    finally:
        dist.destroy_process_group()


def test_every_rank_names_the_damaged_file_and_the_last_whole_checkpoint(tmp_path):
    whole = make_root(tmp_path / "whole", 2, 4, 6)
    roots = {
        name: Path(shutil.copytree(whole, tmp_path / name)) for name in ("cut", "flipped", "gone", "record", "older")
    }
    folders = {name: root / name_iteration(6) for name, root in roots.items()}
    (folders["cut"] / SMALL).write_bytes(b"0" * 499)
    flip(folders["flipped"] / SMALL)
    (folders["gone"] / LARGE).unlink()
    (folders["record"] / "files.json").write_text("{")
    flip(folders["older"] / LARGE)
    flip(roots["older"] / name_iteration(4) / ".metadata")
    alone = make_root(tmp_path / "alone", 6) / name_iteration(6)
    flip(alone / LARGE)
    results = run_ranks(check_all, 2, {**folders, "whole": whole / name_iteration(6), "alone": alone})
    assert results[0] == results[1]
    found, by_size, other, full, rank = results[0]

    def told(name, step):
        latest = roots[name] / LATEST_FILE
        return f"; restore the file, or write {step} into {latest} to go back to {name_iteration(step)}, which is whole"

    changed = "not the bytes that were saved (SHA-256)"
    assert found["whole"] == ""
    assert found["cut"] == f"{folders['cut'] / SMALL}: 499 bytes, but 500 were saved" + told("cut", 4)
    assert found["flipped"] == f"{folders['flipped'] / SMALL}: {changed}" + told("flipped", 4)
    assert found["gone"] == f"{folders['gone'] / LARGE}: missing" + told("gone", 4)
    assert found["older"] == f"{folders['older'] / LARGE}: {changed}" + told("older", 2)
    assert found["record"].startswith(f"{folders['record']}/files.json: damaged (")
    assert found["record"].endswith(told("record", 4))
    assert found["alone"].endswith("; restore the file; there is no earlier checkpoint to go back to")
    assert by_size == ""
    assert other.endswith(f"; restore the file, or make {roots['cut']} again")
    assert full == "some/file: No space left on device; make room or mend the storage, then start again"
    assert rank == 0
