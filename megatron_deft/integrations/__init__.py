"""Other people's packages, one file each; nothing else of megatron_deft imports them."""
