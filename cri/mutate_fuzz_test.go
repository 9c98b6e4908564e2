package cri

import (
	"context"
	"math"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A script is the fuzzer's bytes read as decisions.
type script struct{ b []byte }

func (s *script) next(n int) int {
	if len(s.b) == 0 || n <= 0 {
		return 0
	}
	c := int(s.b[0])
	s.b = s.b[1:]
	if n > 256 && len(s.b) > 0 {
		c = c<<8 | int(s.b[0])
		s.b = s.b[1:]
	}
	return c % n
}

var (
	tenMiB       = strings.Repeat("0123456789abcdef", 10<<16)
	weirdStrings = []string{
		"", "\x00", "a\x00b", "..", ".", "/", "../../../../etc/shadow", "/../../etc/cron.d/x", "a/../../../b", "/proc/self/mem", "/dev/zero", "/sys",
		"/etc/hostname", "/etc", "relative/path", "-", "--help", "$(reboot)", "%s%n%d", "a\nb", "a\rb\t", "a=b", "=", " ", "é\u202e\U0001f4a3", "\xff\xfe",
		"net.ipv4.../../x", "memory.max/../../x", "0-", "4294967296", "-1", "root", "localhost/../../x", "CAP_ALL", "ALL", "NaN", "1e309",
		aSandbox, aContainer, "sha256:" + strings.Repeat("a", 64), "atoll.local/web@sha256:zz",
		strings.Repeat("A", 256), strings.Repeat("a/", 3000), strings.Repeat("é", 70000),
	}
	weirdInts = []int64{0, 1, -1, 2, 7, 128, 1000, 65535, 65536, 1 << 31, -1 << 31, 1 << 32, 1<<32 - 1, 1 << 46, 1 << 62, math.MaxInt64, math.MinInt64}
)

func (s *script) text() string {
	switch n := s.next(len(weirdStrings) + 4); {
	case n < len(weirdStrings):
		return weirdStrings[n]
	case n == len(weirdStrings) && s.next(8) == 0:
		return tenMiB
	default:
		k := min(s.next(64), len(s.b))
		text := string(s.b[:k])
		s.b = s.b[k:]
		return text
	}
}

// scalar makes a value of a field's kind.
func (s *script) scalar(fd protoreflect.FieldDescriptor) protoreflect.Value {
	n := weirdInts[s.next(len(weirdInts))]
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(n&1 == 0)
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(s.text())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(s.text()))
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(int32(n)))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(n))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(n))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(math.Float64frombits(uint64(n)))
	}
	return protoreflect.ValueOfInt64(n)
}

// mutate changes one thing somewhere in m.
func (s *script) mutate(m protoreflect.Message) {
	for depth := 0; depth < 8; depth++ {
		fields := m.Descriptor().Fields()
		if fields.Len() == 0 {
			return
		}
		fd := fields.Get(s.next(fields.Len()))
		switch {
		case fd.IsMap():
			s.mutateMap(m.Mutable(fd).Map(), fd)
			return
		case fd.IsList():
			list := m.Mutable(fd).List()
			if fd.Kind() != protoreflect.MessageKind {
				s.mutateList(list, fd)
				return
			}
			switch op := s.next(4); {
			case op == 0 && list.Len() > 0: // the same again
				list.Append(protoreflect.ValueOfMessage(proto.Clone(list.Get(0).Message().Interface()).ProtoReflect()))
				return
			case op == 1 || list.Len() == 0:
				list.Append(list.NewElement())
			}
			m = list.Get(s.next(list.Len())).Message()
		case fd.Kind() == protoreflect.MessageKind:
			if s.next(8) == 0 {
				m.Clear(fd)
				return
			}
			m = m.Mutable(fd).Message()
		default:
			m.Set(fd, s.scalar(fd))
			return
		}
	}
}

func (s *script) mutateList(list protoreflect.List, fd protoreflect.FieldDescriptor) {
	v := s.scalar(fd)
	if list.Len() > 0 && s.next(2) == 0 {
		list.Set(s.next(list.Len()), v)
		return
	}
	n := 1 + s.next(2)*s.next(5000)
	if fd.Kind() == protoreflect.StringKind {
		n = min(n, 1+(12<<20)/(len(v.String())+1)) // what a message can carry
	}
	for range n {
		list.Append(v)
	}
}

func (s *script) mutateMap(m protoreflect.Map, fd protoreflect.FieldDescriptor) {
	v := m.NewValue()
	if fd.MapValue().Kind() != protoreflect.MessageKind {
		v = s.scalar(fd.MapValue())
	}
	m.Set(s.scalar(fd.MapKey()).MapKey(), v)
}

// FuzzConfigs starts from requests that work, changes some of their fields,
// and leads what came of it through its whole life.
func FuzzConfigs(f *testing.F) {
	for i := range 64 {
		f.Add([]byte{byte(i), byte(i * 7), byte(i * 31), byte(i), 1, byte(i * 3), 2, byte(i * 5), byte(i * 11), byte(i * 13)})
	}
	r := newFuzzRig(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		r.t = t
		s := &script{b}
		flags := s.next(16)
		pod := &runtimeapi.RunPodSandboxRequest{Config: fullPod("/var/log/pods")}
		ctr := &runtimeapi.CreateContainerRequest{PodSandboxId: "", Config: fullContainer()}
		for range 1 + s.next(6) {
			if flags&1 == 0 {
				s.mutate(pod.ProtoReflect())
			} else {
				s.mutate(ctr.Config.ProtoReflect())
			}
		}
		r.life(t, pod, ctr, flags&2 != 0)
		r.restore(t)
		if flags == 15 {
			r.restart(t)
		}
	})
}

// What is mutated must work when it is not, or the fuzzer sees refusals alone.
func TestFullConfigsWork(t *testing.T) {
	r := newFuzzRig(t)
	pod, ctr := &runtimeapi.RunPodSandboxRequest{Config: fullPod("/logs")}, fullContainer()
	r.place(pod.ProtoReflect())
	rt := &runtimeService{Server: r.server}
	sb, err := rt.RunPodSandbox(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	c, err := rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb.PodSandboxId, Config: ctr})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rt.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		t.Fatal(err)
	}
	r.restore(t)
}

// over sends m as the wire would carry it; ok is false when it cannot.
func (r *fuzzRig) over(m proto.Message) (ok bool) {
	wire, err := proto.Marshal(m)
	if err != nil || len(wire) > maxMessage {
		return false
	}
	proto.Reset(m)
	if proto.Unmarshal(wire, m) != nil {
		return false
	}
	r.place(m.ProtoReflect())
	return true
}

// life leads a pod through everything that a client can ask of it.
func (r *fuzzRig) life(t testing.TB, pod *runtimeapi.RunPodSandboxRequest, ctr *runtimeapi.CreateContainerRequest, exits bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	byName := map[string]func(proto.Message) error{}
	for _, m := range r.rpcs {
		byName[m.name] = func(req proto.Message) error {
			err := m.call(ctx, func(v any) error { proto.Merge(v.(proto.Message), req); return nil })
			r.judge(t, m.name, err)
			if status.Code(err) == codes.DeadlineExceeded {
				t.Errorf("%s did not end", m.name)
			}
			return err
		}
	}
	if !r.over(pod) || !r.over(ctr) {
		return
	}
	if byName["RunPodSandbox"](pod) != nil {
		return
	}
	for _, sb := range r.server.store.allSandboxes() {
		if sb.ID != r.sandbox {
			ctr.PodSandboxId = sb.ID
		}
	}
	if err := byName["CreateContainer"](ctr); err != nil {
		r.readBack(byName)
		return
	}
	id := r.server.store.containersOf(ctr.PodSandboxId)[0].ID
	if byName["StartContainer"](&runtimeapi.StartContainerRequest{ContainerId: id}) == nil {
		g := r.host.guest(pod.GetConfig().GetMetadata().GetUid())
		if g != nil {
			g.log(id, "a line")
		}
		if exits && g != nil {
			g.exit(id, 3, "Error")
		} else {
			byName["ExecSync"](&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"exit", "1"}})
			byName["UpdateContainerResources"](&runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: ctr.Config.GetLinux().GetResources()})
		}
	}
	r.readBack(byName)
	byName["StopContainer"](&runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 1})
	byName["RemoveContainer"](&runtimeapi.RemoveContainerRequest{ContainerId: id})
	byName["StopPodSandbox"](&runtimeapi.StopPodSandboxRequest{PodSandboxId: ctr.PodSandboxId})
}

// readBack asks for all that is reported of what was made.
func (r *fuzzRig) readBack(byName map[string]func(proto.Message) error) {
	byName["ListPodSandbox"](&runtimeapi.ListPodSandboxRequest{})
	byName["ListContainers"](&runtimeapi.ListContainersRequest{})
	byName["ListPodSandboxStats"](&runtimeapi.ListPodSandboxStatsRequest{})
	for _, sb := range r.server.store.allSandboxes() {
		byName["PodSandboxStatus"](&runtimeapi.PodSandboxStatusRequest{PodSandboxId: sb.ID, Verbose: true})
	}
	for _, c := range r.server.store.allContainers() {
		byName["ContainerStatus"](&runtimeapi.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	}
}

// restart has another server read what this one wrote.
func (r *fuzzRig) restart(t testing.TB) {
	want := len(r.server.store.allContainers())
	if err := r.server.Close(); err != nil {
		t.Fatal(err)
	}
	r.open()
	if got := len(r.server.store.allContainers()); got != want {
		t.Errorf("%d containers after a restart, %d before", got, want)
	}
	r.restore(t)
}

// Requests as large as gRPC takes are refused by name of the field, and cost
// no more than themselves, a few times over.
func TestLargeRequests(t *testing.T) {
	r := newFuzzRig(t)
	rt := &runtimeService{Server: r.server}
	env := func(n, size int) *runtimeapi.ContainerConfig {
		c := ctrConfig("large")
		for range n {
			c.Envs = append(c.Envs, &runtimeapi.KeyValue{Key: "K" + newID()[:16], Value: []byte(tenMiB[:size])})
		}
		return c
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for what, c := range map[string]*runtimeapi.ContainerConfig{
		"one variable of 10 MB": env(1, len(tenMiB)), "10 MB in many": env(200, 50<<10), "a command of 10 MB": {
			Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: "atoll.local/web:1"}, Command: []string{tenMiB},
		},
	} {
		_, err := rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.sandbox, Config: c})
		if err = toGRPC(err); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "ConfigMap") || len(err.Error()) > 1000 {
			t.Errorf("%s: %.300v; want InvalidArgument that names the cure", what, err)
		}
	}
	if _, err := rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.sandbox, Config: env(15, 100<<10)}); err != nil {
		t.Errorf("1.5 MB of environment, which Linux takes: %v", err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 300<<20 {
		t.Errorf("%d MiB were allocated for 32 MiB of requests", grown>>20)
	}
	r.restore(t)
}
