// Choosing a preset writes its values into the node's widgets, so that what runs is what the widgets show.
// The values come with the node's schema. Loading a workflow does not call widget callbacks, so it overwrites nothing.
import { app } from "../../scripts/app.js";

const presetsOf = new Map();

app.registerExtension({
  name: "clip-finetune.presets",

  beforeRegisterNodeDef(nodeType, nodeData) {
    const presets = nodeData.input?.optional?.preset?.[1]?.clip_finetune_presets;
    if (presets) presetsOf.set(nodeData.name, presets);
  },

  nodeCreated(node) {
    const presets = presetsOf.get(node.comfyClass);
    const preset = node.widgets?.find((widget) => widget.name === "preset");
    if (!presets || !preset) return;
    const original = preset.callback;
    preset.callback = function (value, ...rest) {
      const result = original?.call(this, value, ...rest);
      for (const [name, presetValue] of Object.entries(presets[value] ?? {})) {
        const widget = node.widgets.find((other) => other.name === name);
        if (!widget || widget.value === presetValue) continue;
        widget.value = presetValue;
        widget.callback?.(presetValue, app.canvas, node);
      }
      node.setDirtyCanvas(true, true);
      return result;
    };
  },
});
