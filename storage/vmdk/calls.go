package vmdk

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/cns"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/pbm"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vslm"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
	vslmtypes "github.com/vmware/govmomi/vslm/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// services are the ways into vCenter beside the session's own: CNS, VSLM, PBM,
// and /sdk in CNS's namespace, without which a vCenter may not show what CNS's
// tasks resulted in.
type services struct {
	session                 *vsphere.Session
	cns, results, vslm, pbm soap.RoundTripper
	cnsClient, sdkClient    *soap.Client
	pbmClient               *soap.Client

	mu       sync.Mutex
	version  string // of CNS; empty: not asked yet
	name     string // of the user, as vCenter has it
	vslmThis *ref
}

func (s *services) init(session *vsphere.Session) {
	s.session = session
	s.cnsClient, s.cns = session.Service(cns.Path, cns.Namespace)
	s.sdkClient, s.results = session.Service(vim25.Path, cns.Namespace)
	_, s.vslm = session.Service(vslm.Path, vslm.Namespace)
	s.pbmClient, s.pbm = session.Service(pbm.Path, pbm.Namespace)
}

// ready asks vCenter once which version of CNS's API it speaks.
func (s *services) ready(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.version != "" {
		return nil
	}
	u := s.cnsClient.URL()
	u.Path = vim25.Path + "/vsanServiceVersions.xml"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return fmt.Errorf("the version of vCenter's CNS: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var v struct {
		Version string `xml:"namespace>version"`
	}
	err = s.cnsClient.Do(ctx, req, func(res *http.Response) error {
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", u.Path, res.Status)
		}
		return xml.NewDecoder(res.Body).Decode(&v)
	})
	if err == nil && v.Version == "" {
		err = fmt.Errorf("%s names none", u.Path)
	}
	if err != nil {
		return vsphere.Error("ask vCenter "+s.session.Address()+" for the version of its CNS", err)
	}
	if s.name, err = s.whoami(ctx); err != nil {
		return vsphere.Error("ask vCenter "+s.session.Address()+" whose session this is", err)
	}
	s.version, s.cnsClient.Version, s.sdkClient.Version = v.Version, v.Version, v.Version
	return nil
}

func (s *services) whoami(ctx context.Context) (string, error) {
	if err := s.session.Login(ctx); err != nil {
		return "", err
	}
	sessions := s.session.Client().ServiceContent.SessionManager
	found, err := s.session.Retrieve(ctx, map[ref][]string{*sessions: {"currentSession"}})
	if err != nil {
		return "", err
	}
	me, ok := found[*sessions]["currentSession"].(types.UserSession)
	if !ok {
		return "", fmt.Errorf("vCenter %s does not say: %w", s.session.Address(), errdefs.ErrUnavailable)
	}
	return me.UserName, nil
}

// user is as whom the session is, once ready.
func (s *services) user() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.name
}

// localFault makes an error of a fault that came with an answer.
func localFault(f *types.LocalizedMethodFault) error {
	return &vsphere.FaultError{Reason: f.LocalizedMessage, Method: f.Fault}
}

// manager is VSLM's.
func (s *services) manager(ctx context.Context) (ref, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.vslmThis == nil {
		res, err := vslmmethods.RetrieveContent(ctx, s.vslm, &vslmtypes.RetrieveContent{This: vslm.ServiceInstance})
		if err != nil {
			return ref{}, vsphere.Error("reach VSLM of vCenter "+s.session.Address(), err)
		}
		s.vslmThis = &res.Returnval.VStorageObjectManager
	}
	return *s.vslmThis, nil
}

// A starter starts a task of CNS's.
type starter func(context.Context, soap.RoundTripper) (ref, error)

// do runs a task of CNS's and returns what it resulted in. key is the volume's;
// tasks of one volume run one after the other. A task that failed, or whose end
// is not known, is an error with a class; a volume's own failure is in the
// result.
func (d *Disks) do(ctx context.Context, what, key string, start starter) (types.AnyType, error) {
	if err := d.services.ready(ctx); err != nil {
		return nil, err
	}
	id := ""
	defer func() { d.past.ended(id) }()
	seen, err := d.tasks.Do(ctx, ref{Type: "CnsVolume", Value: key}, func(ctx context.Context) (ref, error) {
		task, err := start(ctx, d.services.cns)
		if err == nil {
			id = task.Value
			d.past.began(id)
		}
		return task, err
	})
	if err != nil {
		return nil, wrap(what, err)
	}
	switch seen.(type) {
	case cnstypes.CnsVolumeOperationBatchResult, cnstypes.CnsSnapshotQueryResult:
		return seen, nil // the watch was told
	}
	result, err := d.result(ctx, id)
	if err != nil {
		return nil, wrap(what, err)
	}
	return result, nil
}

// result reads what a task of CNS's resulted in.
func (d *Disks) result(ctx context.Context, id string) (types.AnyType, error) {
	task := ref{Type: "Task", Value: id}
	res, err := methods.RetrieveProperties(ctx, d.services.results, &types.RetrieveProperties{
		This: d.session.Client().ServiceContent.PropertyCollector,
		SpecSet: []types.PropertyFilterSpec{{
			PropSet:   []types.PropertySpec{{Type: "Task", PathSet: []string{"info.result"}}},
			ObjectSet: []types.ObjectSpec{{Obj: task}},
		}},
	})
	if err != nil {
		return nil, err
	}
	for _, o := range res.Returnval {
		for _, p := range o.PropSet {
			return p.Val, nil
		}
	}
	return nil, fmt.Errorf("vCenter does not say what task %s resulted in: %w", id, errdefs.ErrUnavailable)
}

// doOne runs a task on one volume; its failure is the error, for class.
func (d *Disks) doOne(ctx context.Context, what, key string, start starter) (cnstypes.BaseCnsVolumeOperationResult, error) {
	result, err := d.do(ctx, what, key, start)
	if err != nil {
		return nil, err
	}
	batch, ok := result.(cnstypes.CnsVolumeOperationBatchResult)
	if !ok || len(batch.VolumeResults) != 1 {
		return nil, fmt.Errorf("%s: vCenter's answer is %T with another number of results than one: %w", what, result, errdefs.ErrUnavailable)
	}
	one := batch.VolumeResults[0]
	if f := one.GetCnsVolumeOperationResult().Fault; f != nil {
		return one, wrap(what, localFault(f))
	}
	return one, nil
}

// A faulted error has the fault that vCenter gave, for who has a use for it.
type faulted struct {
	error
	fault types.BaseMethodFault
}

func (f *faulted) Unwrap() error { return f.error }

func faultOf(err error) types.BaseMethodFault {
	var f *faulted
	if errors.As(err, &f) {
		return f.fault
	}
	return nil
}

// wrap is vsphere.Error, with disks' own classes, and the fault kept. What we
// are not let in to is as unknown as what does not answer.
func wrap(what string, err error) error {
	if err == nil || faultOf(err) != nil {
		return err
	}
	fault := vsphere.Fault(err)
	out := vsphere.Error(what, err)
	switch fault.(type) {
	case *types.NoDiskSpace, *types.InsufficientStorageSpace:
		out = fmt.Errorf("%s: the datastore has no room for it: free some space or add a datastore: %w", what, errdefs.ErrResourceExhausted)
	case *types.NotFound, *cnstypes.CnsVolumeNotFoundFault, *cnstypes.CnsSnapshotNotFoundFault:
		out = fmt.Errorf("%s: vCenter has no such disk or snapshot: %w", what, errdefs.ErrNotFound)
	}
	if errdefs.IsPermissionDenied(out) {
		out = fmt.Errorf("%w (%w)", out, errdefs.ErrUnavailable)
	}
	if errors.Is(out, errdefs.ErrUnknown) || errdefs.IsAborted(out) {
		out = fmt.Errorf("%w (%w)", out, errdefs.ErrUnavailable)
	}
	if fault == nil {
		return out
	}
	return &faulted{out, fault}
}

// notThere tells whether a fault says that a disk, snapshot or device is gone.
func notThere(err error) bool {
	switch faultOf(err).(type) {
	case *types.NotFound, *cnstypes.CnsVolumeNotFoundFault, *cnstypes.CnsSnapshotNotFoundFault:
		return true
	}
	return false
}

func inUse(err error) bool {
	switch faultOf(err).(type) {
	case *types.ResourceInUse, *types.InvalidState:
		return true
	}
	return false
}

// lost tells whether a call was made and its outcome is not known.
func lost(err error) bool {
	return err != nil && errdefs.IsUnavailable(err) && !errdefs.IsPermissionDenied(err)
}
