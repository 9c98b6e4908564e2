package tap

import (
	"errors"
	"fmt"
	"net"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/netplugin"
)

// portIsFree refuses a port on which the node itself listens: the packet filter
// would give the pod what is meant for the kubelet, the API server or a
// registry on loopback, and all of these would be lost to the node.
func portIsFree(p netplugin.HostPort) error {
	host := ""
	if p.HostIP.IsValid() {
		host = p.HostIP.String()
	}
	address := net.JoinHostPort(host, strconv.Itoa(int(p.HostPort)))
	var err error
	switch p.Protocol {
	case "tcp":
		var l net.Listener
		if l, err = net.Listen("tcp4", address); err == nil {
			return l.Close()
		}
	case "udp":
		var c net.PacketConn
		if c, err = net.ListenPacket("udp4", address); err == nil {
			return c.Close()
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("host port %d/%s is in use by a process of the node: choose another: %w", p.HostPort, p.Protocol, errdefs.ErrAlreadyExists)
	}
	return nil // whatever else it is, nobody loses a connection
}
