"""Models that several processes hold together, with the engines of torch.distributed."""
