"""What `jaxrl_vlm.plan` stands on: programs of a stage as shapes, compiled for TPUs that are not
there, and what their text says of memory, FLOPs and collectives."""
