"""Everything that talks to ComfyUI: folders, device, display and CLIP sockets.

Other modules of the pack import nothing of ComfyUI but `comfy_api`, which node classes are made of.
"""
