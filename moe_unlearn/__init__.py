"""moe-unlearn: unlearning of Mixture-of-Experts language models as one exact step."""
