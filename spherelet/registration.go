package spherelet

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/spherelet/config"
)

// csiVersion is the version of CSI that the driver serves.
const csiVersion = "1.12.0"

// registration tells the kubelet's plug-in watcher of the CSI driver in this
// process, as node-driver-registrar does of one in a pod.
type registration struct {
	registerapi.UnsafeRegistrationServer
	endpoint string
	log      *slog.Logger
}

// registerDriver serves the registration below the kubelet's root directory.
// Its socket stays when the process ends, so that the driver does not leave the
// node's CSINode with every restart.
func registerDriver(kubeletRoot, endpoint string, log *slog.Logger) (stop func(), err error) {
	socket := filepath.Join(kubeletRoot, config.RegistrationSocketBelow)
	if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
		return nil, err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	s := grpc.NewServer()
	registerapi.RegisterRegistrationServer(s, registration{endpoint: endpoint, log: log})
	go func() {
		if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			log.Error("registration of the CSI driver ended", "err", err)
		}
	}()
	return s.Stop, nil
}

// GetInfo implements registerapi.RegistrationServer.
func (r registration) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{Type: registerapi.CSIPlugin, Name: v1alpha1.CSIDriverName, Endpoint: r.endpoint, SupportedVersions: []string{csiVersion}}, nil
}

// NotifyRegistrationStatus implements registerapi.RegistrationServer. The
// kubelet tries again by itself.
func (r registration) NotifyRegistrationStatus(_ context.Context, s *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.log.Info("CSI driver is registered with the kubelet", "driver", v1alpha1.CSIDriverName)
	} else {
		r.log.Warn("the kubelet did not take the CSI driver; it tries again", "driver", v1alpha1.CSIDriverName, "err", s.GetError())
	}
	return &registerapi.RegistrationStatusResponse{}, nil
}
