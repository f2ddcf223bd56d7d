"""Our own files against docs/adapter_format.md and its JSON schema."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from efft_kernels import EFFT2, LoRA, attach
from efft_kernels.methods import METHODS

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "adapter_format.schema.json").read_text())
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def conforms(value, schema):
    """Whether a value fits a schema; of JSON Schema the keywords that ours uses, and no others."""
    unknown = set(schema) - {
        "$ref",
        "type",
        "const",
        "enum",
        "oneOf",
        "required",
        "properties",
        "additionalProperties",
        "items",
        "minItems",
        "maxItems",
        "minLength",
        "minimum",
        "exclusiveMaximum",
        "contentMediaType",
        "contentSchema",
        "title",
        "description",
        "x-tensors",
        "$schema",
        "$defs",
    }
    assert not unknown
    if "$ref" in schema:
        return conforms(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    checks = []
    if "type" in schema:
        kind = isinstance(value, _TYPES[schema["type"]])
        checks.append(kind and (schema["type"] == "boolean" or not isinstance(value, bool)))
    if "const" in schema:
        checks.append(value == schema["const"])
    if "enum" in schema:
        checks.append(value in schema["enum"])
    if "oneOf" in schema:
        checks.append(sum(conforms(value, option) for option in schema["oneOf"]) == 1)
    if isinstance(value, str):
        checks.append(len(value) >= schema.get("minLength", 0))
        if "contentSchema" in schema:
            checks.append(conforms(json.loads(value), schema["contentSchema"]))
    if isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9))
        checks += [conforms(item, schema.get("items", {})) for item in value]
    if isinstance(value, dict):
        checks += [key in value for key in schema.get("required", ())]
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, item in value.items():
            option = properties.get(key, others)
            checks.append(option if isinstance(option, bool) else conforms(item, option))
    if isinstance(value, int | float):
        checks.append(schema.get("minimum", value) <= value)
        checks.append(value < schema.get("exclusiveMaximum", value + 1))
    return all(checks)


def assert_tensors_as_documented(method, shapes):
    """Each factor's name and shape is in x-tensors, a letter meaning one size within a group."""
    declared = SCHEMA["$defs"][method]["x-tensors"]
    seen, sizes = set(), {}
    for name, shape in shapes.items():
        fits = [
            template
            for template in declared
            if re.fullmatch(re.sub(r"\\\[\w+\\\]", r"\\w+", re.escape(template.rstrip("?"))), name)
        ]
        assert len(fits) == 1, name
        (template,) = fits
        seen.add(template)
        assert len(shape) == len(declared[template])
        scope = name if "[site]" in template and method == "kadaptation" else name.split(".")[0]
        for letter, size in zip(declared[template], shape, strict=True):
            assert sizes.setdefault((scope, letter), size) == size, (name, letter)
    assert {template for template in declared if not template.endswith("?")} <= seen


class TestOurFormat:
    def test_files_are_as_documented(self, make_vit, tmp_path, method):
        path = tmp_path / "adapter.safetensors"
        attach(make_vit(), method).save(path, metadata={"task": "cifar"})
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert conforms(header, SCHEMA)
        factors = {
            name.removeprefix("factors."): shape
            for name, shape in shapes.items()
            if name.startswith("factors.")
        }
        assert_tensors_as_documented(method.name, factors)
        others = set(shapes) - {f"factors.{name}" for name in factors}
        assert others == {"modules.head.weight", "modules.head.bias"}

    def test_stages_are_as_documented(self, make_swin, tmp_path):
        path = tmp_path / "adapter.safetensors"
        attach(make_swin(), EFFT2(rank=[2, (3, 2)])).save(path)
        with safe_open(path, framework="pt") as file:
            assert conforms(file.metadata(), SCHEMA)
            assert {"factors.stage0_mhsa.U", "factors.stage1_ffn.core"} <= set(file.keys())

    def test_every_method_and_field_is_in_the_schema(self):
        for name, method in METHODS.items():
            if method.__module__.startswith("efft_kernels."):
                fields = {field.name for field in dataclasses.fields(method)}
                assert set(SCHEMA["$defs"][name]["properties"]) == {"name", *fields}
                later = {"ffn_init", "factor_init", "attention_side"}  # absent in older files
                later |= {"dropout"} if name == "lora" else set()
                assert set(SCHEMA["$defs"][name]["required"]) == {"name", *fields} - later

    def test_every_method_is_documented(self):
        text = (DOCS / "adapter_format.md").read_text()
        assert set(re.findall(r"^\| `(\w+)` \|.*`", text, re.MULTILINE)) >= set(METHODS)
        choices = {option["$ref"] for option in SCHEMA["$defs"]["method"]["oneOf"]}
        assert choices == {f"#/$defs/{name}" for name in METHODS}

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "other"),
            ("format_version", "2"),
            ("targets", "[]"),
            ("method", '{"name": "nothing"}'),
            ("method", '{"name": "lora", "rank": 0, "scale": 1, "matrices": null}'),
            ("method", '{"name": "lora", "rank": 1, "scale": 1, "matrices": null, "x": 1}'),
            ("base_shapes", '{"head.bias": [-1]}'),
        ],
    )
    def test_the_schema_refuses(self, make_vit, tmp_path, key, value):
        path = tmp_path / "adapter.safetensors"
        attach(make_vit(), LoRA(rank=2)).save(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        assert conforms(header, SCHEMA)
        assert not conforms({**header, key: value}, SCHEMA)
        assert not conforms({k: v for k, v in header.items() if k != key}, SCHEMA)
