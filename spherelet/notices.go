package spherelet

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/vmpod"
)

// tellNotice shows it as an event of the Pod.
func tellNotice(recorder record.EventRecorder, n vmpod.Notice) {
	ref := &v1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: n.Namespace, Name: n.Name, UID: types.UID(n.PodUID)}
	recorder.Event(ref, v1.EventTypeWarning, n.Reason, clipEvent(n.Message))
}
