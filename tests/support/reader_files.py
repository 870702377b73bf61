"""Files for each of Ray Data's readers, a few rows each."""

from __future__ import annotations

import io
import json
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

__all__ = ["READS", "Files", "table"]


def table(number: int) -> pa.Table:
    return pa.table({"id": [number * 10 + i for i in range(4)], "name": ["a", "b", "ü", "d"]})


def write_csv(path: Path, number: int) -> None:
    table(number).to_pandas().to_csv(path, index=False)


def write_json_lines(path: Path, number: int) -> None:
    table(number).to_pandas().to_json(path, orient="records", lines=True)


def write_json_document(path: Path, number: int) -> None:
    path.write_text(json.dumps(table(number).to_pylist()))


def write_text(path: Path, number: int) -> None:
    path.write_text(f"line {number}\n\nanother {number}\n")


def write_numpy(path: Path, number: int) -> None:
    np.save(path, np.arange(number, number + 6).reshape(3, 2))


def write_image(path: Path, number: int) -> None:
    from PIL import Image

    Image.new("RGB", (4, 5), (number, 2, 3)).save(path)


def write_orc(path: Path, number: int) -> None:
    pyarrow.orc.write_table(table(number), path)


def write_avro(path: Path, number: int) -> None:
    fastavro = pytest.importorskip("fastavro")
    fields = [{"name": "id", "type": "long"}, {"name": "name", "type": "string"}]
    schema = {"type": "record", "name": "row", "fields": fields}
    with path.open("wb") as file:
        fastavro.writer(file, schema, table(number).to_pylist())


def write_webdataset(path: Path, number: int) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(3):
            content = f"text {number} {i}".encode()
            info = tarfile.TarInfo(f"sample{number}{i}.txt")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_audio(path: Path, number: int) -> None:
    pytest.importorskip("soundfile")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.full(100, number, dtype=np.int16).tobytes())


def write_video(path: Path, number: int) -> None:
    """Grey frames as uncompressed YUV4MPEG2, which decord reads whatever the file is called."""
    pytest.importorskip("decord")
    frames = b"".join(
        b"FRAME\n" + bytes([16 + 20 * number + i]) * 256 + bytes([128]) * 128 for i in range(4)
    )
    path.write_bytes(b"YUV4MPEG2 W16 H16 F5:1 Ip A1:1 C420jpeg\n" + frames)


def write_tfrecords(path: Path, number: int) -> None:
    tensorflow: Any = pytest.importorskip("tensorflow")
    train = tensorflow.train
    with tensorflow.io.TFRecordWriter(str(path)) as writer:
        for i in range(4):
            features = {
                "id": train.Feature(int64_list=train.Int64List(value=[number * 10 + i])),
                "name": train.Feature(bytes_list=train.BytesList(value=["ü".encode()])),
                "scores": train.Feature(float_list=train.FloatList(value=[0.5, i])),
            }
            example = train.Example(features=train.Features(feature=features))
            writer.write(example.SerializeToString())


def write_mcap(path: Path, number: int) -> None:
    mcap: Any = pytest.importorskip("mcap.writer")
    with path.open("wb") as file:
        writer = mcap.Writer(file)
        writer.start()
        schema = writer.register_schema(name="say", encoding="jsonschema", data=b"{}")
        channel = writer.register_channel(topic="/say", message_encoding="json", schema_id=schema)
        for i in range(4):
            data = json.dumps({"id": number * 10 + i}).encode()
            writer.add_message(channel_id=channel, log_time=i, publish_time=i, data=data)
        writer.finish()


def write_parquet(path: Path, number: int) -> None:
    pq.write_table(table(number), path)


class Files(NamedTuple):
    """Files of one kind: how they end, what writes the one of a number, options of the reader."""

    ending: str
    write: Callable[[Path, int], None]
    options: dict[str, Any]

    def fill(self, folder: Path, numbers: range) -> None:
        """Write files into a folder, and one into a folder of it."""
        (folder / "nested").mkdir(parents=True, exist_ok=True)
        for number in numbers:
            self.write(
                folder / ("nested" if number == 1 else "") / f"{number}{self.ending}", number
            )


READS: dict[str, list[Files]] = {
    "read_parquet": [Files(".parquet", write_parquet, {})],
    "read_csv": [Files(".csv", write_csv, {"include_paths": True})],
    "read_json": [
        Files(".jsonl", write_json_lines, {"lines": True}),
        Files(".json", write_json_document, {}),
    ],
    "read_text": [Files(".txt", write_text, {"drop_empty_lines": True})],
    "read_binary_files": [Files(".bin", write_text, {"include_paths": True})],
    "read_numpy": [Files(".npy", write_numpy, {})],
    "read_images": [Files(".png", write_image, {"mode": "RGB", "include_paths": True})],
    "read_orc": [Files(".orc", write_orc, {})],
    "read_avro": [Files(".avro", write_avro, {})],
    "read_webdataset": [Files(".tar", write_webdataset, {})],
    "read_audio": [Files(".wav", write_audio, {})],
    "read_videos": [Files(".avi", write_video, {"include_timestamps": True})],
    "read_mcap": [Files(".mcap", write_mcap, {"include_paths": True})],
    "read_tfrecords": [Files(".tfrecords", write_tfrecords, {})],
}
"""The readers of files; ``read_tfrecords`` needs TensorFlow, a gigabyte."""
