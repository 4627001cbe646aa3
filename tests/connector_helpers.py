"""What the tests of the connectors share: tables read in both directions, and running a connector by itself."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxvlm.models.connectors import connector
from jaxvlm.models.vlm import VLM
from jaxvlm.parallel.rules import RULES
from jaxvlm.weights import axes, import_part
from jaxvlm.weights.families.connectors import connector_family
from jaxvlm.weights.plan import slot_rows


@partial(jax.jit, static_argnums=0)
def project(config, params, *features):
    return VLM(config).apply({"params": {"connector": params}}, *features, method="project")


def project_and_idle(config, params, *features):
    """(visual tokens [B, T * P, D], the parameters that change nothing), from one compilation.

    Those are the parameters whose gradient of a fixed sum of the visual tokens is rounding at most.
    """
    out, gradients = _project(config, params, *features)
    largest = {path: float(np.abs(value).max()) for path, value in flatten_dict(gradients, sep="/").items()}
    return np.asarray(out), {path for path, value in largest.items() if not value > 1e-6 * max(largest.values())}


@partial(jax.jit, static_argnums=0)
def _project(config, params, *features):
    def loss(params):
        out = project(config, params, *features)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(params)
    return out, gradients


def imported(config, state, folder):
    """The connector's parameters from a state dict, as a user imports them."""
    save_file(state, folder / "state.safetensors")
    return import_part(folder / "state.safetensors", "connector", config)


def exported(config, params):
    """The state dict back from the parameters, by the same table."""
    leaves, state, parts = flatten_dict(params, sep="/"), {}, {}
    family = connector_family(config)
    sizes = family.sizes(config)
    for rule in family.active(config):
        numbers = rule.layers if rule.stacked else [0]
        values = leaves.pop(rule.path) if rule.stacked else leaves.pop(rule.path)[None]
        assert len(numbers) == len(values)
        for number, value in zip(numbers, values, strict=True):
            name, value = (
                rule.keys.replace("{i}", str(number)),
                axes.convert(np.asarray(value), axes.reverse(rule.axes), sizes),
            )
            if rule.slots:
                rows = slot_rows(rule, sizes)
                assert len(value) == rows[rule.slot + 1] - rows[rule.slot]
                parts.setdefault(name, {})[rule.slot] = value
            else:
                state[name] = value
    assert not leaves, f"no rule writes {list(leaves)}"
    joined = {name: np.concatenate([found[slot] for slot in sorted(found)]) for name, found in parts.items()}
    return state | joined


def check_round_trip(config, params, state, left_out=()):
    """The table gives every tensor of `state` back as it was."""
    back = exported(config, params)
    assert back.keys() == {name for name in state if name not in left_out}
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def axes_and_shapes(config, *features):
    """{path: (logical axis names, shape)} of the connector's parameters; nothing is computed."""
    made = jax.eval_shape(connector(config, jnp.float32).init, jax.random.key(0), *features)["params"]
    boxes = flatten_dict(made, is_leaf=lambda _, x: isinstance(x, nn.meta.AxisMetadata), sep="/")
    return {path: (box.names, box.value.shape) for path, box in boxes.items()}


def check_axes(config, *features):
    """Every dimension's name is in the sharding table, and no two of a parameter land on one mesh axis."""
    found = axes_and_shapes(config, *features)
    for path, (names, shape) in found.items():
        assert len(names) == len(shape), path
        used = [getattr(RULES, name) for name in names if name is not None and getattr(RULES, name)]
        assert len(used) == len(set(used)), (config.connector.kind, path, names)
    return found


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
