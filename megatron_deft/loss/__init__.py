"""The loss: objectives on logits, whole or sharded, and the hook into megatron-core."""
