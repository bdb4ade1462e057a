"""Speculation: several tokens per read of the weights. Prompt lookup drafts, the target model verifies a chain.

`lookup` finds what may follow, `policy` decides how much of it is worth checking, `worker` is what SGLang's scheduler
calls, `verification` turns logits into accepted tokens, `graphs` records the steps, `algorithm` registers all that.
"""
