"""Small files in exactly the published formats, and `datasets` without a network."""

import pytest

from tests.support import benchmark_files


@pytest.fixture
def write(tmp_path):
    """`benchmark_files.write` under the test's folder."""
    return lambda name, content: benchmark_files.write(tmp_path / name, content)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The real library, offline, its cache in the test's folder."""
    library = pytest.importorskip("datasets", reason="hub data sets need the extra [data], which [dev] has")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    library.disable_progress_bars()
    return library


@pytest.fixture
def hub_folder(tmp_path, datasets):
    """A folder in hub layout: a README that names configs and splits, and their parquet files."""

    def make(name, parts):
        folder, header = tmp_path / name, ["---", "configs:"]
        for config, splits in parts.items():
            header += [f"- config_name: {config}", "  data_files:"]
            for split, rows in splits.items():
                path = folder / config / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                datasets.Dataset.from_list(rows).to_parquet(str(path))
                header += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        (folder / "README.md").write_text("\n".join([*header, "---", f"# {name}", ""]), encoding="utf-8")
        return folder

    return make
