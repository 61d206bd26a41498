"""MoRA teaches SmolLM2-135M-Instruct four unlike text tasks, one after another, on a laptop.

Paper      MoRA, arXiv 2506.21035; hyper-parameters of its TRACE run except the learning rate and the number of steps,
           which were chosen for a 135M model (rank = k = 8, tau 0.03, delta 0.2, scale alpha / r = 2, q, k, v, o).
Command    python -m mora_jax.train --config=configs/llm_cl.py --workdir=runs/llm_cl
Also       --config=configs/llm_cl.py:benchmark=folder,method=inc_lora --config.benchmark.root=DIR
"""

from configs import common


def get_config(arg=""):
    c = common.base()
    words = common.apply_argument(c, arg)
    if c.benchmark.name == "packaged_text":  # sizes for a few minutes on two cores; its prompts are short
        c.benchmark.update({"train_limit": 192, "eval_limit": 48})
        c.train.update({"steps_per_task": 24, "epochs_per_task": 0})
        c.train.update({"max_prompt_tokens": 72, "max_answer_tokens": 24, "length_bucket": 96})
        c.eval.batch_size = 24
    if "smoke" in words:
        common.smoke(c)
    return c
