"""Train the thinker of an omni model, which reads, sees and hears, on conversations: Qwen2.5-Omni, Qwen3-Omni.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.omni.train_qwen_omni run.yaml --train.freeze_audio_tower

It is the script of vision-language models: the model's processor says what it takes besides pictures and videos, and
its own function gives the positions of sounds. What such a model speaks with (the talker) is neither built nor trained;
of a whole model's folder the thinker is taken, and the thinker is what is exported.
"""

from __future__ import annotations

from veomni_recipes.tasks.omni.train_qwen_vl import Config, build_model, main, read_data

__all__ = ["Config", "build_model", "main", "read_data"]

if __name__ == "__main__":
    main()
