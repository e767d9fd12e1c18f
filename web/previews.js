// When a training node has finished, remove its last live preview: the page would go on showing it instead of the final
// chart, and Nodes 2.0 a second time below it. The page has no public call for this; without the store nothing happens.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "clip-finetune.previews",

  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const id = String(detail.display_node ?? detail.node);
      if (!app.graph.getNodeById(id)?.comfyClass?.startsWith("TrainCLIP")) return;
      const stores = document.getElementById("vue-app")?.__vue_app__?.config.globalProperties.$pinia?._s;
      stores?.get("nodeOutput")?.revokePreviewsByExecutionId(id);
    });
  },
});
