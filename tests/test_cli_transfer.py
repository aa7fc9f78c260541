from pathlib import Path

from command_line import Command, check_failed, hasher


def test_export_then_import(folder: Path, hashret: Command) -> None:
    model = f"{folder}/.hashret/models/{hasher().fingerprint}"
    assert hashret("export", "out.jsonl") == (0, "", f"exported 40 items to out.jsonl; their model is {model}\n")
    assert hashret("export", "out", "--format", "numpy", "-q") == (0, "", "")
    result = hashret("import", "out.jsonl", "-c", "new")
    check_failed(result, 1, f"no collection at {folder}/new: add --model MODEL_DIR")
    result = hashret("import", "out.jsonl", "-c", "new", "--model", "other")
    check_failed(result, 1, "codes of another model, [0-9a-f]{16}: give the folder of that model")
    assert not (folder / "new").exists()
    result = hashret("import", "out.jsonl", "-c", "new", "--model", model)
    assert result == (0, "", f"40 added; 40 items in {folder}/new\n")
    assert hashret("query", "id:7", "-c", "new").out == hashret("query", "id:7").out
    assert hashret("import", "out.jsonl").err == f"0 added; 40 items in {folder}/.hashret\n"
    hashret("train", "photos", "--model", "pca", "--bits", 16, "-c", "third")
    check_failed(hashret("import", "out.jsonl", "-c", "third"), 1, "out.jsonl holds codes of another model")
