"""Tests of megatron_deft.models."""

from megatron_deft.platform import import_megatron

import_megatron()  # before a test file imports megatron-core by itself: quicker, no warnings
