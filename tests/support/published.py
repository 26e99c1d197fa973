"""What the models' cards say: the number of parameters."""

PUBLISHED = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "google/gemma-3-1b-it": 999_885_952,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
