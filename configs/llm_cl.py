"""A frozen language model learns a stream of text tasks, one after another; `benchmark=` chooses stream and defaults.

benchmark=packaged_text (default): MoRA teaches SmolLM2-135M-Instruct four unlike tasks on a laptop.
    Paper      MoRA, arXiv 2506.21035; hyper-parameters of its TRACE run except the learning rate and the number of
               steps, which were chosen for a 135M model (rank = k = 8, tau 0.03, delta 0.2, scale alpha / r = 2, q, k,
               v, o).
    Command    python -m mora_jax.train --config=configs/llm_cl.py --workdir=runs/llm_cl
    Also       --config=configs/llm_cl.py:benchmark=folder,method=inc_lora --config.benchmark.root=DIR

benchmark=trace: the eight tasks of TRACE, arXiv 2310.06762, as MoRAM (the later name of MoRA) runs them.
    Command    python -m mora_jax.train --config=configs/llm_cl.py:benchmark=trace,model=llama3.2-1b
               --workdir=runs/trace --config.benchmark.root=DIR --config.eval.decoding=moram
    Defaults   published: rank = k = 8, tau 0.03, delta 0.2, scale 2, q, k, v, o; 2, 1, 3, 2, 1, 2, 2, 3 epochs, global
               batch 32, Adam (0.9, 0.95), clip 1.0, learning rate 5e-4 constant. Not here: dropout 0.1 on x.
               Decoding is greedy unless `moram` is asked for, which is the published one.
    Published  PUBLISHED BY OTHERS AND NOT REPRODUCED HERE. The 500-example set; overall performance / magnitude of
               clipped backward transfer:
                          LLaMA-2-7B-Chat   Gemma-2B-it     LLaMA-3.2-1B-Instruct
               SeqLoRA    34.30 / 18.5      31.89 / 15.28   29.73 / 17.03
               EWC        42.36 / 5.97      28.35 / 16.96   31.96 / 11.62
               O-LoRA     42.78 / 7.16      33.73 / 12.36   32.94 / 12.89
               TreeLoRA   43.52 / 3.46      33.41 / 8.50    36.14 / 7.36
               CoDyRA     43.82 / 3.25      33.96 / 7.94    37.46 / 5.11
               MoRAM      44.54 / 1.37      36.27 / 2.74    37.77 / 3.12

benchmark=standard_cl: text classification as generation, arXiv 2310.14152 (O-LoRA). standard_cl_published has prompts
that name the dataset, as O-LoRA's do.
    Command    python -m mora_jax.train --config=configs/llm_cl.py:benchmark=standard_cl --workdir=runs/standard_cl
               --config.benchmark.root=DIR --config.benchmark.tasks=order1     (order1 .. order3 have 4 tasks,
               order4 .. order6 have 15)
    Defaults   published for O-LoRA on T5-large: rank 8, alpha 32 (scale 4), 1 epoch, batch 64, learning rate 1e-3
               constant, 512 tokens of prompt, 50 of answer.
    Published  PUBLISHED BY OTHERS AND NOT REPRODUCED HERE. T5-large, overall performance: O-LoRA 78.37 (order1), 72.17
               (order6); MoRAM 77.6 (4 tasks), 69.7 (15 tasks).
"""

from configs import common

_STANDARD_CL = {
    "benchmark.tasks": "order1",
    "method.scale": 4.0,
    "train.batch_size": 64,
    "train.learning_rate": 1e-3,
}
# Benchmark -> what its claim above changes of `common.base`.
CLAIMS = {
    "packaged_text": {  # sizes for a few minutes on two cores; its prompts are short
        "benchmark.train_limit": 192,
        "benchmark.eval_limit": 48,
        "train.steps_per_task": 24,
        "train.epochs_per_task": 0,
        "train.max_prompt_tokens": 72,
        "train.max_answer_tokens": 24,
        "train.length_bucket": 96,
        "eval.batch_size": 24,
    },
    "trace": {
        "train.epochs_per_task": -1,  # each task has its own
        "train.batch_size": 32,
        "train.learning_rate": 5e-4,
    },
    "standard_cl": _STANDARD_CL,
    "standard_cl_published": _STANDARD_CL,
}


def get_config(arg=""):
    c = common.base()
    words = common.apply_argument(c, arg)
    c.update_from_flattened_dict(CLAIMS.get(c.benchmark.name, {}))
    if "smoke" in words:
        common.smoke(c)
    return c
