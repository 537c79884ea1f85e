package relay

import (
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
)

// The link takes its time to see that a gateway was killed. Outside mail does
// not wait for that: after one silence it goes by the next gateway.
func TestOutsideMailLeavesByAnotherGatewayAfterOneSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, origin, gw1, gw2)
		w.gateways = []mesh.NodeID{gw1, gw2}
		for _, n := range []mesh.NodeID{origin, gw2} {
			w.nodes[n].start()
		}
		dead, _ := newPipe()
		o := w.nodes[origin]
		dial := o.r.d.Dial
		o.r.d.Dial = func(ctx ctx, n mesh.NodeID, service string) (conn, error) {
			if n == gw1 {
				return dead, nil
			}
			return dial(ctx, n, service)
		}
		began := time.Now()
		o.accept(1, toGateway, far("x@a.example"))
		for len(w.tried()) == 0 && time.Since(began) < time.Hour {
			time.Sleep(100 * time.Millisecond)
		}
		if d := time.Since(began); d > progress+2*time.Second {
			t.Errorf("it left after %v", d)
		}
		if gs := o.r.gateways(); gs[0] != gw2 {
			t.Errorf("%v are tried in this order", gs)
		}
		o.r.PeerUp(gw1)
		if gs := o.r.gateways(); gs[0] != gw1 {
			t.Errorf("once it is back %v are tried in this order", gs)
		}
		time.Sleep(time.Minute)
		o.kill()
		w.nodes[gw2].kill()
	})
}
