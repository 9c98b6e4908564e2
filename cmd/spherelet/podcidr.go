package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"github.com/openatoll/atoll/netplugin"
)

// A rememberedNetwork keeps the node's pod range over restarts: the kubelet
// tells it again only after it has reported the Node, which would be NotReady
// for so long ("the node has no pod CIDR yet").
type rememberedNetwork struct {
	netplugin.Network
	file string
}

// remember configures the network with what file says, if it is there.
func remember(ctx context.Context, n netplugin.Network, file string) (*rememberedNetwork, error) {
	r := &rememberedNetwork{Network: n, file: file}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	var cidrs []netip.Prefix
	if err == nil {
		err = json.Unmarshal(b, &cidrs)
	}
	if err == nil {
		err = n.Configure(ctx, cidrs)
	}
	if err != nil {
		return nil, fmt.Errorf("pod range remembered in %s: %w: remove the file if the node got another range", file, err)
	}
	return r, nil
}

func (r *rememberedNetwork) Configure(ctx context.Context, cidrs []netip.Prefix) error {
	if err := r.Network.Configure(ctx, cidrs); err != nil {
		return err
	}
	b, err := json.Marshal(cidrs)
	if err != nil {
		return err
	}
	tmp := r.file + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, r.file)
}
