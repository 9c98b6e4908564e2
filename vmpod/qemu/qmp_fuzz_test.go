package qemu

import (
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// FuzzQMP has a monitor say anything: the connection ends or a command is
// answered, and nobody waits for ever.
func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"QMP":{}}` + "\n" + `{"return":{},"id":1}` + "\n"))
	f.Add([]byte(`{"QMP":{}}` + "\n" + `{"event":"STOP","timestamp":{"seconds":-1,"microseconds":9e18}}` + "\n"))
	f.Add([]byte(`{"QMP":{}}` + "\n" + `{"QMP":{}}` + "\n" + `{"error":null,"id":1}` + "\n" + `{"return":1,"id":1}` + "\n"))
	f.Add([]byte(`{"id":18446744073709551615}` + "\n\x00\xff{"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		path := filepath.Join(t.TempDir(), "q")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Write(wire)
			conn.(*net.UnixConn).CloseWrite()
			time.Sleep(time.Millisecond)
			conn.Close()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		q, err := dialQMP(ctx, path, func(qmpEvent) {})
		if err == nil {
			var out json.RawMessage
			_ = q.run(ctx, "query-status", nil, &out)
			q.close()
		}
		if ctx.Err() != nil {
			t.Error("it ended by its deadline alone")
		}
	})
}
