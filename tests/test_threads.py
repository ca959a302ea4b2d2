"""Threads that share a pipeline or a model forecast what they forecast one after the other, to the last bit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from test_pipeline import SCHEDULERS, past, seeded
from tiny import frames, tiny_model, tiny_pipeline

from earthformer_hf import KnowledgeAlignmentCallback
from earthformer_hf.guidance import frame_mean


def at_once(function, arguments) -> list:
    """What a function returns of each argument, in as many threads that begin together."""
    start = threading.Barrier(len(arguments))

    def begin(argument):
        start.wait(60)
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(begin, arguments))


def quiet(scheduler, **options):
    pipeline = tiny_pipeline(SCHEDULERS[scheduler], block_out_channels=(16,), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def various(thread: int) -> dict:
    """A call that differs from those of the neighbours in all that a call keeps."""
    return {
        "past_values": past(1 + thread % 2, seed=thread),
        "ensemble_size": 1 + thread % 3,
        "num_inference_steps": 1 + thread % 4,
        "generator": seeded(thread),
        "max_batch_size": (None, 4)[thread % 2],
        "eta": thread % 2,
        "output_type": ("pt", "latent")[thread % 2],
    }


def equal(results, expected):
    assert len(results) == len(expected) and all(map(torch.equal, results, expected))


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_calls_with_other_steps_seeds_and_sizes(name):
    pipeline = quiet(name)

    def predictions(thread):
        return pipeline(**various(thread)).predictions

    expected = [predictions(thread) for thread in range(16)]
    equal(at_once(predictions, range(16)), expected)


def test_calls_of_a_pipeline_whose_networks_are_offloaded():
    """Each call removes the hooks that move the networks, and sets them again."""
    pipeline = quiet("ddim")
    expected = [pipeline(**various(thread)).predictions for thread in range(6)]
    pipeline.enable_model_cpu_offload(device="cpu")
    equal(at_once(lambda thread: pipeline(**various(thread)).predictions, range(6)), expected)
    assert len(pipeline._all_hooks) == 2 and all(hook.model._hf_hook is hook.hook for hook in pipeline._all_hooks)


@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_guidance_towards_other_targets(name):
    """Callbacks of their own, and one for all whose target follows from the context."""
    pipeline, shared = quiet(name, alignment=True), KnowledgeAlignmentCallback(lambda x: frame_mean(x) + 1, frame_mean)

    def latents(thread):
        own = KnowledgeAlignmentCallback(float(thread), guidance_scale=5.0 + thread)
        guide = MultiPipelineCallbacks([own, shared]) if thread % 2 else own
        return pipeline(**various(thread), callback_on_step_end=guide).latents

    expected = [latents(thread) for thread in range(8)]
    equal(at_once(latents, range(8)), expected)
    assert not torch.equal(expected[-1], pipeline(**various(7)).latents)


class Meeting(PipelineCallback):
    """Ends one of several calls after its first step, when all of them have come so far."""

    tensor_inputs = ["latents"]

    def __init__(self, barrier: threading.Barrier, end: str):
        super().__init__()
        self.barrier, self.end, self.seen = barrier, end, []

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        schedule = pipeline.scheduler.timesteps
        self.seen.append((pipeline.num_timesteps, len(schedule), pipeline.max_batch_size, pipeline.interrupt))
        assert schedule[step_index] == timesteps
        if step_index == 0:
            self.barrier.wait(60)
            if self.end:
                pipeline._interrupt = True
            self.barrier.wait(60)
            if self.end == "raise":
                raise KeyError(self.end)
        return callback_kwargs


@pytest.mark.parametrize("end", ["interrupt", "raise"])
def test_the_end_of_one_call_is_not_that_of_the_others(end):
    pipeline = quiet("dpm-solver++")

    def latents(thread, barrier):
        callback = Meeting(barrier, end if thread == 0 else "")
        try:
            result = pipeline(**various(thread), callback_on_step_end=callback).latents
        except KeyError as reason:
            result = torch.tensor(reason.args[0] == "raise")
        options = various(thread)
        steps, bound = options["num_inference_steps"], options["max_batch_size"]
        assert callback.seen == [(steps, steps, bound, False)] * (1 if thread == 0 else steps)
        return result

    expected = [latents(thread, threading.Barrier(1)) for thread in range(6)]
    barrier = threading.Barrier(6)
    equal(at_once(lambda thread: latents(thread, barrier), range(6)), expected)
    assert not pipeline.interrupt and pipeline.num_timesteps == 0 and pipeline.max_batch_size is None


def test_forward_passes_of_an_earthformer():
    """Of other batches, with and without hidden states and attention, which the library records by hooks."""
    ours, twin = (tiny_model(attn_implementation="eager") for _ in range(2))
    twin.load_state_dict(ours.state_dict())

    def tensors(model, thread):
        options = {"output_hidden_states": thread % 2 == 0, "output_attentions": thread % 3 == 0}
        with torch.no_grad():
            output = model(frames(model.config, 1 + thread % 3, seed=thread), **options)
        nested = (value if isinstance(value, tuple) else (value,) for value in output.values())
        return [tensor for values in nested for tensor in values]

    expected = [tensors(twin, thread) for thread in range(16)]
    results = at_once(lambda thread: tensors(ours, thread), range(16))
    assert len({len(one) for one in expected}) == 4
    for result, one in zip(results, expected):
        equal(result, one)
