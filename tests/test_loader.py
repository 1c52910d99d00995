"""`DataLoader`: what a batch holds, the order, resume, and what is refused."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCENE_NAMES
from small_datasets import drawn, edit
from tiny_shards import write_shards
from torch import Tensor

from rinr_loader import BundleError, ConfigError, DataLoader, RinrDataset
from rinr_loader.crops import RandomResizedCrop
from rinr_loader.decode import decode, whole
from rinr_loader.geometry import Letterbox, Placements

SIZE = (24, 32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of one size in four shards."""
    dest = tmp_path_factory.mktemp("loader") / "set"
    write_shards(dest, [drawn(f"{i:02d}", i, objects=i % 4) for i in range(11)], names=SCENE_NAMES, shard_samples=3)
    return dest


def make(dataset: Path | RinrDataset, **arguments: object) -> DataLoader:
    return DataLoader(dataset, device="cpu", **{"batch_size": 3, **arguments})  # type: ignore[arg-type]


def contents(batches: Iterable[object]) -> list[tuple[object, ...]]:
    """Everything of some batches that can be compared with ==."""
    found = []
    for images, targets in batches:  # type: ignore[misc]
        columns = (targets.boxes, targets.classes, targets.crowd, targets.batch_index, targets.labels)
        found.append((images.numpy().tobytes(), targets.keys, *[column.tolist() for column in columns]))
    return found


def test_a_batch_is_what_decoding_its_samples_gives(dataset: Path) -> None:
    source = RinrDataset(dataset)
    images, targets = next(iter(make(source, batch_size=4)))
    buffer = source.read(range(4))
    assert images.dtype == torch.uint8
    assert torch.equal(images, decode(buffer, whole(buffer, SIZE), size=SIZE))
    assert targets.keys == ("00", "01", "02", "03")
    assert torch.equal(targets.boxes, buffer.box)
    assert torch.equal(targets.classes, buffer.class_id)
    assert targets.batch_index.tolist() == [1, 2, 2, 3, 3, 3]
    assert targets.labels.tolist() == [-1] * 4


def test_boxes_move_with_the_pixels(dataset: Path) -> None:
    _, plain = next(iter(make(dataset, batch_size=4)))
    _, larger = next(iter(make(dataset, batch_size=4, size=(48, 96))))
    assert torch.allclose(larger.boxes, plain.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    images, boxed = next(iter(make(dataset, batch_size=4, size=(64, 64), transform=Letterbox(), fill=7)))
    assert torch.allclose(boxed.boxes, plain.boxes * 2 + torch.tensor([0.0, 8.0, 0.0, 8.0]))
    assert (images[:, :, :8] == 7).all()
    assert (images[:, :, 8] != 7).any()


def test_floats_are_in_zero_to_one_or_normalised(dataset: Path) -> None:
    counted, _ = next(iter(make(dataset)))
    scaled, _ = next(iter(make(dataset, dtype=torch.float32)))
    assert (scaled * 255 - counted).abs().max() <= 0.5 + 1e-3
    normalised, _ = next(iter(make(dataset, dtype=torch.float32, normalize=((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))))
    expected = (scaled - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    assert torch.allclose(normalised, expected, atol=1e-5)
    last, _ = next(iter(make(dataset, channels_last=True)))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_gives_every_sample_once(dataset: Path) -> None:
    loader = make(dataset, shuffle=True, shuffle_shards=2, seed=3)
    epochs = [[key for _, targets in loader for key in targets.keys] for _ in range(3)]
    assert all(sorted(keys) == [f"{i:02d}" for i in range(11)] for keys in epochs)
    assert len({tuple(keys) for keys in epochs}) == 3, "epochs count up by themselves"
    loader.set_epoch(1)
    assert [key for _, targets in loader for key in targets.keys] == epochs[1]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [3, 3, 3, 2]), (True, [3, 3, 3])])
def test_len_is_the_number_of_batches(dataset: Path, drop_last: bool, sizes: list[int]) -> None:
    loader = make(dataset, drop_last=drop_last)
    assert [len(images) for images, _ in loader] == sizes
    assert len(loader) == len(sizes)


AUGMENTED = {"shuffle": True, "shuffle_shards": 2, "transform": RandomResizedCrop(), "seed": 9}


@pytest.mark.parametrize("done", range(5))
def test_interrupted_at_any_batch_it_continues_as_if_it_had_not_been(dataset: Path, done: int) -> None:
    loader = make(dataset, **AUGMENTED)
    loader.set_epoch(2)
    uninterrupted = contents(loader) + contents(loader)  # the rest of this epoch, and the next
    first = make(dataset, **AUGMENTED)
    first.set_epoch(2)
    batches = iter(first)
    before = contents(next(batches) for _ in range(done))
    state = first.state_dict()
    second = make(dataset, **AUGMENTED, num_workers=2)
    second.load_state_dict(state)
    rest = contents(second)
    after = contents(second) if done < 4 else []
    assert before + rest + after == uninterrupted


def test_what_is_read_ahead_is_not_counted_as_given(dataset: Path) -> None:
    loader = make(dataset, num_workers=2, prefetch_factor=2)
    batches = iter(loader)
    next(batches)
    assert loader.state_dict()["consumed"] == 3


def test_resuming_reads_only_what_is_left(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(dataset)
    batches = iter(first)
    next(batches)
    next(batches)
    source = RinrDataset(dataset)
    read: list[int] = []
    original = source.read
    monkeypatch.setattr(source, "read", lambda indices: (read.extend(np.asarray(indices).tolist()), original(indices))[1])
    second = make(source)
    second.load_state_dict(first.state_dict())
    list(second)
    assert read == [6, 7, 8, 9, 10]


def test_a_position_is_augmented_alike_whatever_the_batch_size(dataset: Path) -> None:
    def pictures(batch_size: int) -> Tensor:
        return torch.cat([images for images, _ in make(dataset, **{**AUGMENTED, "batch_size": batch_size})])

    assert (pictures(2).int() - pictures(5).int()).abs().max() <= 1
    assert not torch.equal(pictures(2), torch.cat([images for images, _ in make(dataset, **{**AUGMENTED, "seed": 10})]))


def test_threads_change_nothing(dataset: Path) -> None:
    assert contents(make(dataset, **AUGMENTED)) == contents(make(dataset, **AUGMENTED, num_workers=3, prefetch_factor=1))


def test_ranks_share_out_an_epoch(dataset: Path) -> None:
    keys = [[key for _, targets in make(dataset, rank=rank, world_size=2, shuffle=True) for key in targets.keys] for rank in range(2)]
    assert len(keys[0]) == len(keys[1])
    assert {*keys[0], *keys[1]} == {f"{i:02d}" for i in range(11)}
    assert len(keys[0]) + len(keys[1]) == 12, "one is repeated, so that both get as many"


def test_stopping_early_leaves_no_thread_behind(dataset: Path) -> None:
    before = threading.active_count()
    batches = iter(make(dataset, batch_size=1, num_workers=3))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_iterating_starts_nothing_before_the_first_batch(dataset: Path) -> None:
    before = threading.active_count()
    iter(make(dataset, num_workers=3))
    assert threading.active_count() == before


def test_a_damaged_sample_is_an_error_that_names_it(dataset: Path, tmp_path: Path) -> None:
    dest = tmp_path / "set"
    write_shards(dest, [drawn(f"{i}", i) for i in range(4)], names=SCENE_NAMES)
    offset = int(RinrDataset(dest).column("offset")[2])
    edit(dest / "train/train-000000.tar", lambda data: data.__setitem__(offset + 400, data[offset + 400] ^ 1))
    batches = iter(make(dest, batch_size=2, num_workers=1))
    next(batches)
    with pytest.raises(BundleError, match=r"train-000000\.tar:2\.rinr: expected checksum"):
        next(batches)


def test_a_state_of_another_order_is_refused(dataset: Path, tmp_path: Path) -> None:
    state = make(dataset, shuffle=True).state_dict()
    with pytest.raises(ConfigError, match="expected shuffle False, got True"):
        make(dataset).load_state_dict(state)
    with pytest.raises(ConfigError, match="expected shuffle_shards 2, got 8"):
        make(dataset, shuffle=True, shuffle_shards=2).load_state_dict(state)
    write_shards(tmp_path / "other", [drawn("x", 1)], names=SCENE_NAMES)
    with pytest.raises(ConfigError, match="expected dataset"):
        make(tmp_path / "other", shuffle=True).load_state_dict(state)
    with pytest.raises(ConfigError, match="expected version"):
        make(dataset, shuffle=True).load_state_dict({**state, "version": 99})


def test_sizes_that_differ_need_a_size(tmp_path: Path) -> None:
    dest = tmp_path / "set"
    write_shards(dest, [drawn("a", 1), drawn("b", 2, width=40, height=30)], names=SCENE_NAMES)
    with pytest.raises(ConfigError, match=r"got 2 sizes; pass size=\(height, width\)"):
        make(dest)
    images, _ = next(iter(make(dest, size=(20, 20))))
    assert images.shape == (2, 3, 20, 20)


@pytest.mark.parametrize("name", ["batch_size", "prefetch_factor", "shuffle_shards"])
def test_counts_are_at_least_one(dataset: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected at least 1, got 0"):
        make(dataset, **{name: 0})


def test_arguments_that_do_not_fit_are_refused(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="num_workers: expected at least 0, got -1"):
        make(dataset, num_workers=-1)
    with pytest.raises(ConfigError, match="normalize: expected a floating dtype"):
        make(dataset, normalize=((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ConfigError, match="rank: expected 0 to 1, got 2"):
        make(dataset, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="collate_fn: expected None"):
        make(dataset, collate_fn=list)
    with pytest.raises(TypeError, match="'batchsize'"):
        make(dataset, batchsize=3)


def test_torch_arguments_about_worker_processes_are_accepted_and_said_once(dataset: Path) -> None:
    with pytest.warns(UserWarning, match="pin_memory, persistent_workers: without a meaning") as caught:
        make(dataset, pin_memory=True, persistent_workers=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(dataset, sampler=None, collate_fn=None)


def test_a_transform_of_ones_own_is_a_function(dataset: Path) -> None:
    def upside_down(source_size: Tensor, *, size: tuple[int, int], random: object) -> Placements:
        count = len(source_size)
        matrix = torch.tensor([[1.0, 0, 0], [0, -1, SIZE[0]], [0, 0, 1]]).expand(count, 3, 3)
        clip = torch.tensor([0.0, 0, SIZE[1], SIZE[0]]).expand(count, 4)
        return Placements(torch.arange(count), torch.arange(count), matrix, clip)

    plain, plain_targets = next(iter(make(dataset)))
    turned, targets = next(iter(make(dataset, transform=upside_down)))
    assert (turned.flip(2).int() - plain.int()).abs().max() <= 1
    assert torch.allclose(targets.boxes[:, 1], SIZE[0] - plain_targets.boxes[:, 3])


def test_what_was_broken_off_is_not_continued_unasked(dataset: Path) -> None:
    arguments = {**AUGMENTED, "transform": None}
    epochs = [contents(loader) for loader in [make(dataset, **arguments)] for _ in range(3)]
    loader = make(dataset, **arguments)
    next(iter(loader))  # a look at a batch
    assert contents(loader) == epochs[1], "every iteration is a whole epoch, and another one"
    for _ in loader:
        break
    assert len(contents(loader)) == len(loader)
    loader.set_epoch(0)
    next(iter(loader))
    loader.set_epoch(0)
    assert contents(loader) == epochs[0]


def test_a_chain_of_interruptions_is_one_epoch(dataset: Path) -> None:
    uninterrupted = contents(make(dataset, **AUGMENTED))
    state, found = make(dataset, **AUGMENTED).state_dict(), []
    for k in range(4):
        loader = make(dataset, **AUGMENTED, num_workers=k % 2)
        loader.load_state_dict(json.loads(json.dumps(state)))
        found += contents([next(iter(loader))])
        state = loader.state_dict()
    assert found == uninterrupted
    assert (state["epoch"], state["consumed"]) == (1, 0)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 1), (7, 1), (1, 2), (2, 3)])
def test_the_rest_of_an_epoch_may_have_other_batches(dataset: Path, batch_size: int, world_size: int) -> None:
    def given_out(loader: DataLoader) -> list[str]:
        return [key for _, targets in loader for key in targets.keys]

    whole_epoch = given_out(make(dataset, shuffle=True))
    first = make(dataset, shuffle=True)
    next(iter(first))
    rest = []
    for rank in range(world_size):
        loader = make(dataset, shuffle=True, batch_size=batch_size, rank=rank, world_size=world_size)
        loader.load_state_dict(first.state_dict())
        rest += given_out(loader)
    assert set(rest) - set(whole_epoch[: len(rest) - 8]) == set(whole_epoch[3:])
    assert len(rest) - 8 < world_size


def test_an_epoch_without_batches_ends(dataset: Path) -> None:
    loader = make(dataset, batch_size=20, drop_last=True)
    assert len(loader) == 0
    assert contents(loader) == []
    assert loader.epoch == 1
    # The rest of an epoch may be too short for one batch of another size.
    first = make(dataset, batch_size=5)
    batches = iter(first)
    next(batches)
    next(batches)
    second = make(dataset, batch_size=4, drop_last=True)
    second.load_state_dict(first.state_dict())
    assert contents(second) == []
    assert len(contents(second)) == 2


def test_a_position_is_augmented_alike_on_every_rank(dataset: Path) -> None:
    alone = {key: image for images, targets in make(dataset, **AUGMENTED) for key, image in zip(targets.keys, images, strict=True)}
    for rank in range(2):
        for images, targets in make(dataset, **AUGMENTED, rank=rank, world_size=2):
            for key, image in zip(targets.keys, images, strict=True):
                again = torch.equal(image, alone[key]) or (image.int() - alone[key].int()).abs().max() <= 1
                assert again or key == next(iter(alone)), "only what fills the last batch stands at another position"


def test_no_thread_outlives_an_error(dataset: Path) -> None:
    def broken(source_size: Tensor, *, size: tuple[int, int], random: object) -> Placements:
        raise RuntimeError("of my own")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="of my own") as caught:
        next(iter(make(dataset, num_workers=3, batch_size=1, transform=broken)))
    assert caught.tb is not None, "the traceback is alive, and with it the frames"
    assert threading.active_count() == before


def test_the_advice_about_sizes_works(tmp_path: Path) -> None:
    dest = tmp_path / "set"
    write_shards(dest, [drawn("a", 1), drawn("b", 2, width=40, height=30)], names=SCENE_NAMES)
    with pytest.raises(ConfigError) as caught:
        make(dest)
    advice = re.search(r"pass (size=\(height, width\))$", str(caught.value))
    assert advice
    arguments = eval(f"dict({advice[1]})", {"height": 18, "width": 22})  # noqa: S307
    assert next(iter(make(dest, **arguments))).images.shape == (2, 3, 18, 22)
    for size in ((0, 20), (20, 0), (-3, 5)):
        with pytest.raises(ConfigError, match=r"size: expected height and width of at least 1"):
            make(dest, size=size)


def test_the_advice_about_normalize_works(dataset: Path) -> None:
    statistics = ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match=r"pass dtype=torch\.float32$"):
        make(dataset, normalize=statistics)
    assert next(iter(make(dataset, normalize=statistics, dtype=torch.float32))).images.dtype == torch.float32


def test_a_path_takes_a_split_and_a_dataset_has_its_own(tmp_path: Path) -> None:
    dest = tmp_path / "set"
    write_shards(dest, [drawn("a", 1), drawn("b", 2, split="val")], names=SCENE_NAMES)
    assert next(iter(make(dest, split="val"))).targets.keys == ("b",)
    assert next(iter(make(RinrDataset(dest, "val")))).targets.keys == ("b",)
    assert next(iter(make(dest / "data.yaml"))).targets.keys == ("a",)
