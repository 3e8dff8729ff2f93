"""The public functions, an operation a file: each checks, allocates and dispatches.

They name no target; what they call lives in the module that `dispatch.target_of` finds.
"""
