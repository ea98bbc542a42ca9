"""Plans for `jaxrl_vlm.plan`: compiles the programs of a stage for TPUs, on a machine without one.

`step` lists the programs as shapes. `compiled` compiles them and reads their memory. `hlo` counts
FLOPs and collectives in the compiled text, and `roofline` estimates the time.
"""
