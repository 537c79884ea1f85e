package appliance

import (
	"context"
	"errors"
	"net"
	"time"

	"posthouse/transport/link"
)

// serveStreams answers the streams of one service, beside one another, until
// ctx ends or the link closes, and waits for those under way. What serve says of
// a stream is for the log alone: the other side sees its end.
func (n *Node) serveStreams(ctx context.Context, l *link.Listener, part string, serve func(context.Context, *link.Conn) error) error {
	defer l.Close()
	g := newGroup(func(error) {})
	defer g.stop()
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, link.ErrClosed) {
				return nil
			}
			return err
		}
		g.run(part+" stream", func(ctx context.Context) error {
			if err := serve(ctx, c); err != nil {
				n.part(part).Debug("stream ended", "peer", n.nodeName(c.Peer()), "err", err)
			}
			return nil
		})
	}
}

// endWith has what is read from and written to conn fail once ctx has ended,
// until stop is called.
func endWith(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
}
