"""What an offline W&B run wrote: its records, read back."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record

Part = list[Record]  # of a run that was resumed: what one of its processes wrote


def read_offline(run: Path) -> list[Part]:
    """The parts of a run, in their order."""
    return [_read(file) for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]


def _read(file: Path) -> Part:
    """Protocol buffers in the log format of LevelDB."""
    data, place, whole, records = file.read_bytes(), 7, b"", []  # after a header of seven bytes
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            break
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the record is complete
            records.append(Record.FromString(whole))
            whole = b""
    return records


def run_ids(parts: Iterable[Part]) -> list[str]:
    """The W&B run that each part belongs to."""
    return [next(record.run.run_id for record in part if record.HasField("run")) for part in parts]


def history_of(parts: Iterable[Part]) -> list[dict[str, Any]]:
    return [_values(record.history.item) for part in parts for record in part if record.HasField("history")]


def config_of(part: Part) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for record in part:
        if record.HasField("config") or record.HasField("run"):
            config |= _values((record.config if record.HasField("config") else record.run.config).update)
    return config


def summary_of(part: Part) -> dict[str, Any]:
    """What stands at the end of a part, with nested values as dictionaries."""
    summary: dict[str, Any] = {}
    for item in (item for record in part if record.HasField("summary") for item in record.summary.update):
        path, value = [item.key] if item.key else list(item.nested_key), json.loads(item.value_json)
        for name in reversed(path[1:]):
            value = {name: value}
        summary[path[0]] = value
    return summary


def metrics_of(parts: Iterable[Part]) -> dict[str, MetricRecord]:
    """The metrics that `define_metric` has defined, by name."""
    records = (record for part in parts for record in part)
    return {r.metric.name: r.metric for r in records if r.HasField("metric") and r.metric.name}


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
